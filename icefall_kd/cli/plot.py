"""Draws pictures of models at work, one command for each kind."""

from icefall_kd.cli.options import Commands

_OF_MODELS = "icefall_kd.cli.plot_models"
_OF_CUTS = "icefall_kd.cli.plot_cuts"
# As MODULES of icefall_kd.cli.
KINDS = {
    "kl": (_OF_CUTS, "Draw at which frames students are far from their teacher."),
    "lattice": (_OF_CUTS, "Draw the transducer's lattice of an utterance."),
    "losses": (_OF_MODELS, "Draw the curves of hard and distillation losses."),
    "spikes": (_OF_CUTS, "Draw where teacher and students put an utterance's tokens."),
    "way": (_OF_MODELS, "Draw the way of the data, from cuts to a report."),
    "wer": (_OF_MODELS, "Draw error rates against parameters and seconds."),
}
plot = Commands(
    name="plot",
    modules=KINDS,
    help="Draw a picture into OUT, an SVG, PNG or PDF by its ending.",
    short_help="Draw models, losses, a lattice, spikes, and where teacher and student "
    "differ.",
)
