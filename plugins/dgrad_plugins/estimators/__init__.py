"""The built-in estimators, one file each, and the names they are registered under."""

from dgrad_plugins.estimators._aimle import AdaptiveImplicitMaximumLikelihood
from dgrad_plugins.estimators._arm import AugmentReinforceMerge
from dgrad_plugins.estimators._arms import AntitheticSamples
from dgrad_plugins.estimators._arsm import AugmentReinforceSwapMerge
from dgrad_plugins.estimators._bitflip import BitFlip
from dgrad_plugins.estimators._direct import Direct
from dgrad_plugins.estimators._direct_joint import DirectJoint
from dgrad_plugins.estimators._direct_linear import DirectLinear
from dgrad_plugins.estimators._direct_rb import DirectRaoBlackwell
from dgrad_plugins.estimators._direct_unbiased import DirectUnbiased
from dgrad_plugins.estimators._disarm import DisARM
from dgrad_plugins.estimators._double_cv import DoubleControlVariates
from dgrad_plugins.estimators._exact import Exact
from dgrad_plugins.estimators._gapped_st import GappedStraightThrough
from dgrad_plugins.estimators._gumbel_softmax import GumbelSoftmax
from dgrad_plugins.estimators._imle import ImplicitMaximumLikelihood
from dgrad_plugins.estimators._leg import LocalExpectation
from dgrad_plugins.estimators._muprop import MuProp
from dgrad_plugins.estimators._perturbed import PerturbedOptimizer
from dgrad_plugins.estimators._rao_st_gumbel_softmax import RaoStraightThroughGumbelSoftmax
from dgrad_plugins.estimators._rebar import Rebar
from dgrad_plugins.estimators._reinforce import Reinforce
from dgrad_plugins.estimators._reinmax import ReinMax
from dgrad_plugins.estimators._reinmax_rao import ReinMaxRao
from dgrad_plugins.estimators._relax import Relax
from dgrad_plugins.estimators._rloo import LeaveOneOut
from dgrad_plugins.estimators._rodeo import Rodeo
from dgrad_plugins.estimators._st_gumbel_softmax import StraightThroughGumbelSoftmax
from dgrad_plugins.estimators._straight_through import StraightThrough
from dgrad_plugins.estimators._sum_and_sample import SumAndSample
from dgrad_plugins.estimators._unordered_set import UnorderedSet

ESTIMATORS = {
    "aimle": AdaptiveImplicitMaximumLikelihood,
    "arm": AugmentReinforceMerge,
    "arms": AntitheticSamples,
    "arsm": AugmentReinforceSwapMerge,
    "bitflip-1": BitFlip,
    "direct": Direct,
    "direct-joint": DirectJoint,
    "direct-linear": DirectLinear,
    "direct-rb": DirectRaoBlackwell,
    "direct-unbiased": DirectUnbiased,
    "disarm": DisARM,
    "double-cv": DoubleControlVariates,
    "exact": Exact,
    "gapped-st": GappedStraightThrough,
    "gumbel-softmax": GumbelSoftmax,
    "imle": ImplicitMaximumLikelihood,
    "leg": LocalExpectation,
    "muprop": MuProp,
    "perturbed": PerturbedOptimizer,
    "rao-st-gumbel-softmax": RaoStraightThroughGumbelSoftmax,
    "rebar": Rebar,
    "reinforce": Reinforce,
    "reinmax": ReinMax,
    "reinmax-rao": ReinMaxRao,
    "relax": Relax,
    "rloo": LeaveOneOut,
    "rodeo": Rodeo,
    "st-gumbel-softmax": StraightThroughGumbelSoftmax,
    "straight-through": StraightThrough,
    "sum-and-sample": SumAndSample,
    "unordered-set": UnorderedSet,
}
