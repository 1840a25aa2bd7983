"""OneTrainer's JSON: a preset, a saved configuration, with its concepts and samples in it or in files of their own.

Read in Nerogar/OneTrainer: modules/util/config/TrainConfig.py, ConceptConfig.py, SampleConfig.py,
modules/util/create.py, modules/modelSetup/mixin/ModelSetupNoiseMixin.py, modules/util/loss/masked_loss.py,
training_presets/.
"""

from dora_diffusion.training.import_config.one_trainer.data import DATA
from dora_diffusion.training.import_config.one_trainer.network import RUN, parts
from dora_diffusion.training.import_config.one_trainer.noise import NOISE
from dora_diffusion.training.import_config.one_trainer.optim import OPTIM
from dora_diffusion.training.import_config.one_trainer.reading import read
from dora_diffusion.training.import_config.one_trainer.run import REST
from dora_diffusion.training.import_config.records import Row, Tool

ROWS: tuple[Row, ...] = (*RUN, *OPTIM, *NOISE, *DATA, *parts(), *REST)

ONE_TRAINER = Tool("OneTrainer", "a preset or configuration, JSON", ROWS, read)
