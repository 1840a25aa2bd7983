"""kohya's sd-scripts: the TOML of `--config_file`, that of `--dataset_config`, and the JSON that its GUI saves.

Options are looked up by their last name, for a dataset's may stand for a subset, a dataset, in [general] or for all.
Read in kohya-ss/sd-scripts: library/train_util.py, library/config_util.py, train_network.py, networks/, docs/.
"""

from dora_diffusion.training.import_config.kohya.data import DATASETS, PATHS
from dora_diffusion.training.import_config.kohya.network import NETWORK
from dora_diffusion.training.import_config.kohya.noise import LOSS
from dora_diffusion.training.import_config.kohya.optim import FLOW, OPTIM
from dora_diffusion.training.import_config.kohya.reading import read
from dora_diffusion.training.import_config.kohya.run import RUN
from dora_diffusion.training.import_config.records import Row, Source, Tool


def _is_whole(source: Source) -> bool:
    """A dataset file alone says nothing of the training."""
    training = {"pretrained_model_name_or_path", "network_module", "network_dim", "LoRA_type", "learning_rate"}
    return any(source.has(name) for name in training)


ROWS: tuple[Row, ...] = (*PATHS, *DATASETS, *NETWORK, *OPTIM, *LOSS, *FLOW, *RUN)

KOHYA = Tool("kohya sd-scripts", "a training TOML, a dataset TOML or the GUI's JSON", ROWS, read, _is_whole)
