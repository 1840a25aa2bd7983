"""An adapter's file is opened once, read once, and hashed as it is read."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.formats import examine, load_examined, safetensors_reader, save_adapter
from dora_diffusion.inspection.header import summarise_header
from dora_diffusion.pipelines.textual_inversion import WordState, load_word, save_words
from dora_diffusion.state import AdapterState
from dora_diffusion.utils.atomic import sha256_of
from tests.formats.adapters import adapter_of, dora

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def adapter() -> AdapterState:
    return adapter_of([(LAYER, torch.ones(6, 4))], dora)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    counts: Counter[Path] = Counter()
    real = safetensors_reader._opened

    def counting(path: Path, name: str) -> object:
        counts[Path(path)] += 1
        return real(path, name)

    monkeypatch.setattr(safetensors_reader, "_opened", counting)
    return counts


@pytest.mark.parametrize("format", ["diffusers", "kohya", "lycoris"])
def test_a_file_is_opened_once_and_its_hash_is_of_what_was_read(adapter, opened, tmp_path, format) -> None:
    path = save_adapter(adapter, tmp_path / "a.safetensors", format=format)
    loaded, examined = load_examined(path)
    assert opened == {path: 1}
    assert examined.sha256 == sha256_of(path)
    assert loaded.modules.keys() == adapter.modules.keys()


def test_a_folder_hashes_as_its_files_do(adapter, opened, tmp_path) -> None:
    folder = save_adapter(adapter, tmp_path / "folder", format="peft")
    expected = sha256_of(folder)
    _, examined = load_examined(folder)
    assert examined.sha256 == expected
    assert opened == Counter(folder.rglob("*.safetensors"))
    assert examine(folder) == replace(examined, sha256=None)


def test_another_byte_is_another_hash(adapter, tmp_path) -> None:
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    before = load_examined(path)[1].sha256
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = load_examined(path)[1].sha256
    assert before != after == sha256_of(path)


def test_a_header_alone_has_no_hash_and_is_read_once(adapter, opened, tmp_path) -> None:
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    assert examine(path).sha256 is None
    opened.clear()
    assert summarise_header(path).structure.layers == 1
    assert opened == {}  # its own quick look was enough


def test_a_words_hash_is_of_its_file(tmp_path) -> None:
    (path,) = save_words([WordState("<zqx>", (torch.ones(2, 8),))], tmp_path)
    assert load_word(path).sha256 == sha256_of(path)
    assert WordState("<zqx>", ()).sha256 is None
