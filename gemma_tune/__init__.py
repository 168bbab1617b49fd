"""gemma-tune: QLoRA supervised fine-tuning and RLHF for Google's Gemma models."""

__version__ = "0.1.0"
