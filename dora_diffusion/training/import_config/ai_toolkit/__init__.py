"""ai-toolkit's YAML or JSON: `job`, `config.name` and one process with network, datasets, train, model, sample, save.

Keys are looked up without `config.process[0].`. Read in ostris/ai-toolkit: toolkit/config_modules.py,
toolkit/scheduler.py, toolkit/prompt_utils.py, toolkit/samplers/, jobs/process/BaseSDTrainProcess.py, config/examples/.
"""

from dora_diffusion.training.import_config.ai_toolkit.data import DATASETS, JOB, MODEL
from dora_diffusion.training.import_config.ai_toolkit.network import NETWORK
from dora_diffusion.training.import_config.ai_toolkit.noise import NOISE
from dora_diffusion.training.import_config.ai_toolkit.reading import read
from dora_diffusion.training.import_config.ai_toolkit.run import SAVE
from dora_diffusion.training.import_config.ai_toolkit.train import TRAIN
from dora_diffusion.training.import_config.records import Row, Tool

ROWS: tuple[Row, ...] = (*JOB, *NETWORK, *DATASETS, *TRAIN, *NOISE, *MODEL, *SAVE)

AI_TOOLKIT = Tool("ai-toolkit", "a job's YAML", ROWS, read)
