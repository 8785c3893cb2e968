"""Silence library notices that need no action; import this before the libraries."""

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels that it can do without
logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
