"""xLSTM for Hugging Face Transformers. Importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)

from .cache_xlstm import XLSTMCache
from .configuration_xlstm import XLSTMConfig
from .conversion_xlstm import convert_from, convert_to
from .forecasting_xlstm import XLSTMForecastOutput, XLSTMForForecasting
from .modeling_xlstm import (
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
    XLSTMPreTrainedModel,
)
from .ops_mlstm import mlstm
from .ops_slstm import slstm
from .recurrent_xlstm import MLSTM, SLSTM, MLSTMCell, SLSTMCell, mLSTM, sLSTM
from .sequence_xlstm import XLSTMEncoder, build_encoder, output_size, param_count, recommended_defaults
from .serving_xlstm import Request, Token, XLSTMEngine
from .states_xlstm import LayerState, MLSTMState, SLSTMState

__version__ = "0.1.0"

__all__ = [
    "MLSTM",
    "SLSTM",
    "LayerState",
    "MLSTMCell",
    "MLSTMState",
    "Request",
    "SLSTMCell",
    "SLSTMState",
    "Token",
    "XLSTMCache",
    "XLSTMConfig",
    "XLSTMEncoder",
    "XLSTMEngine",
    "XLSTMForCausalLM",
    "XLSTMForForecasting",
    "XLSTMForSequenceClassification",
    "XLSTMForTokenClassification",
    "XLSTMForecastOutput",
    "XLSTMModel",
    "XLSTMPreTrainedModel",
    "build_encoder",
    "convert_from",
    "convert_to",
    "mLSTM",
    "mlstm",
    "output_size",
    "param_count",
    "recommended_defaults",
    "sLSTM",
    "slstm",
]

AutoConfig.register("extended_lstm", XLSTMConfig, exist_ok=True)
XLSTMConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, XLSTMModel),
    (AutoModelForCausalLM, XLSTMForCausalLM),
    (AutoModelForSequenceClassification, XLSTMForSequenceClassification),
    (AutoModelForTimeSeriesPrediction, XLSTMForForecasting),
    (AutoModelForTokenClassification, XLSTMForTokenClassification),
):
    auto_class.register(XLSTMConfig, model_class, exist_ok=True)
    # Makes save_pretrained write the code, and an `auto_map`, beside the weights.
    model_class.register_for_auto_class(auto_class.__name__)
