"""tapo_train: reinforcement learning of multimodal search agents with tool-aware credit."""

__version__ = "0.1.0"
