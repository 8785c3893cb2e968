"""Which notices of the libraries ask nothing of the user; imported before any of them is."""

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels that it can do without
logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
