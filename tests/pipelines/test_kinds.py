"""Adapters in pipelines of every kind: exact at 0 and 1, fused as unfused, and leaving nothing behind."""

import pytest
import torch

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.pipelines.components import adaptable_models, as_pipeline
from tests.pipelines.adapters import in_training
from tests.pipelines.kinds import KINDS
from tests.tolerances import assert_identical, assert_near

ROUNDED = 1e-4  # fp32's 6e-8, through ten layers, two steps, and guidance that multiplies differences by 15


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning")  # diffusers' own ControlNet asks the old name
@pytest.mark.parametrize("kind", KINDS)
def test_load_blend_fuse_and_unload(kind: str) -> None:
    drawn = KINDS[kind]()
    before = drawn.draw()
    with in_training(drawn.pipe) as adapter:
        learnt = drawn.draw()
    manager = AdapterManager(drawn.pipe)
    report = manager.load_adapter(adapter, name="a")
    assert set(report.components) == set(adaptable_models(as_pipeline(drawn.pipe)))
    assert_identical(drawn.draw(), before)
    manager.set_adapters({"a": 1.0})
    assert_near(drawn.draw(), learnt, ROUNDED)
    assert not torch.allclose(learnt, before, atol=1e-3)
    manager.fuse()
    assert_near(drawn.draw(), learnt, ROUNDED)
    manager.unfuse()
    manager.set_adapters({"a": 0.0})
    assert_identical(drawn.draw(), before)
    manager.set_adapters({"a": 1.0})
    manager.unload()
    assert_identical(drawn.draw(), before)
