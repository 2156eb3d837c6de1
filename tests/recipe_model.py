"""The model of a recipe whose front end has an option for its channels."""

from torch import nn
from zipformer.bin import train
from zipformer.modules.scaling import ScheduledFloat
from zipformer.modules.subsampling import Conv2dSubsampling


def front_end(settings, *channels):
    """icefall's front end of some channels."""
    return Conv2dSubsampling(
        settings.feature_dim,
        int(settings.encoder_dim.split(",")[0]),
        *channels,
        dropout=ScheduledFloat((0.0, 0.3), (20000.0, 0.1)),
    )


def get_model(settings) -> nn.Module:
    """The package's model; with ``embed_channels`` its front end has these channels."""
    model = train.get_model(settings)
    if "embed_channels" in settings:
        channels = [int(n) for n in settings.embed_channels.split(",")]
        model.encoder_embed = front_end(settings, *channels)
    return model
