"""tuner tunes LoRA fine-tuning of language models and says how long to train."""
