"""A run as a YAML file, and the settings that a tuner finds."""

from autograd_lib.config.reading import load_config
from autograd_lib.config.records import (
    AutogradConfig,
    DataConfig,
    DistributedConfig,
    FeaturesConfig,
    ModelConfig,
    MonitoringConfig,
    OptimizerConfig,
    Settings,
    SystemConfig,
    TrainingConfig,
)

__all__ = [
    "AutogradConfig",
    "DataConfig",
    "DistributedConfig",
    "FeaturesConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimizerConfig",
    "Settings",
    "SystemConfig",
    "TrainingConfig",
    "load_config",
]
