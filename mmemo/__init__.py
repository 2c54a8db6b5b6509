"""Multimodal emotion models (text + audio + video), every claim measured.

`import mmemo as mm` is all that most programs need: `PUBLIC` below lists the names and the module
that each comes from. A module is imported when one of its names is first used, so that
`import mmemo` itself takes no time. Begin with `mm.known_answer` (data), `mm.Multimodal` (a
model), `mm.fit` (training) and `mm.xray` (what the model uses).

The layers, each of which builds on those before it: `core`, `data`, `synthetic`, `models`,
`training`, `evaluation`, `diagnostics`, `experiments`; and `cli`, the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

PUBLIC = {
    # data: values, masks and clocks; a corpus whose best scores are known; real corpora
    "Stream": "core.batch",
    "Batch": "core.batch",
    "collate": "core.batch",
    "known_answer": "synthetic.known_answer",
    "Knobs": "synthetic.knobs",
    "ceiling": "synthetic.factors",
    "Corpus": "data.corpus",
    "read_daicwoz": "data.daicwoz",
    "read_meld": "data.meld",
    "read_ravdess": "data.ravdess",
    # models: an encoder a stream, a fusion, a head a task
    "Multimodal": "models.base",
    "RegressionHead": "models.base",
    "ClassHead": "models.base",
    "Standardize": "models.base",
    "TextEncoder": "models.text",
    "add_lora": "models.lora",
    "TCN": "models.temporal",
    "CrossAttention": "models.attention",
    "get_fusion": "models.fusion",
    # training
    "Plan": "training.plan",
    "fit": "training.loop",
    "Tracking": "training.tracking",
    "mse": "training.objectives",
    "cross_entropy": "training.objectives",
    # evaluation: who is tested, how good, how sure, and by what
    "Protocol": "evaluation.protocols",
    "predict": "models.base",
    "compare": "evaluation.metrics",
    "score_intervals": "evaluation.metrics",
    "xray": "evaluation.xray",
    # diagnostics: what goes through a model, and whether every piece of it works
    "walk": "diagnostics.walk",
    "check_pieces": "diagnostics.component",
    # experiments as data
    "load_recipe": "experiments.recipe",
    "train_recipe": "experiments.run",
}

LAYERS = (
    "core",
    "data",
    "synthetic",
    "models",
    "training",
    "evaluation",
    "diagnostics",
    "experiments",
    "cli",
)

# hidden from type checkers, for whom a module with a __getattr__ has every name
if not TYPE_CHECKING:
    __all__ = ["__version__", *PUBLIC]

    def __getattr__(name: str):
        "A public name or a layer, imported when it is first asked for (PEP 562)."
        if name in PUBLIC:
            found = getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
            globals()[name] = found
            return found
        if name in LAYERS:
            return import_module(f"{__name__}.{name}")
        problem = f"module {__name__!r} has no attribute {name!r}"
        if not name.startswith("_"):
            get_close_matches = import_module("difflib").get_close_matches
            near = get_close_matches(name, [*PUBLIC, *LAYERS], 3, 0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "dir(mmemo) lists the names"
            problem += f"; {hint}"
        # a name without an object: otherwise Python would add a hint of its own
        raise AttributeError(problem, name=name)


def __dir__() -> list[str]:
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*own, "PUBLIC", "LAYERS", *PUBLIC, *LAYERS})


if TYPE_CHECKING:
    # the same table once more, for editors and type checkers; a test compares the two
    from .core.batch import Batch as Batch
    from .core.batch import Stream as Stream
    from .core.batch import collate as collate
    from .data.corpus import Corpus as Corpus
    from .data.daicwoz import read_daicwoz as read_daicwoz
    from .data.meld import read_meld as read_meld
    from .data.ravdess import read_ravdess as read_ravdess
    from .diagnostics.component import check_pieces as check_pieces
    from .diagnostics.walk import walk as walk
    from .evaluation.metrics import compare as compare
    from .evaluation.metrics import score_intervals as score_intervals
    from .evaluation.protocols import Protocol as Protocol
    from .evaluation.xray import xray as xray
    from .experiments.recipe import load_recipe as load_recipe
    from .experiments.run import train_recipe as train_recipe
    from .models.attention import CrossAttention as CrossAttention
    from .models.base import ClassHead as ClassHead
    from .models.base import Multimodal as Multimodal
    from .models.base import RegressionHead as RegressionHead
    from .models.base import Standardize as Standardize
    from .models.base import predict as predict
    from .models.fusion import get_fusion as get_fusion
    from .models.lora import add_lora as add_lora
    from .models.temporal import TCN as TCN
    from .models.text import TextEncoder as TextEncoder
    from .synthetic.factors import ceiling as ceiling
    from .synthetic.knobs import Knobs as Knobs
    from .synthetic.known_answer import known_answer as known_answer
    from .training.loop import fit as fit
    from .training.objectives import cross_entropy as cross_entropy
    from .training.objectives import mse as mse
    from .training.plan import Plan as Plan
    from .training.tracking import Tracking as Tracking
