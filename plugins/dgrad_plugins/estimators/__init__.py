"""The built-in estimators, one file each, and the names they are registered under."""

from dgrad_plugins.estimators._direct import Direct
from dgrad_plugins.estimators._direct_joint import DirectJoint
from dgrad_plugins.estimators._direct_rb import DirectRaoBlackwell
from dgrad_plugins.estimators._exact import Exact
from dgrad_plugins.estimators._gumbel_softmax import GumbelSoftmax
from dgrad_plugins.estimators._leg import LocalExpectation
from dgrad_plugins.estimators._reinforce import Reinforce
from dgrad_plugins.estimators._rloo import LeaveOneOut
from dgrad_plugins.estimators._st_gumbel_softmax import StraightThroughGumbelSoftmax

ESTIMATORS = {
    "direct": Direct,
    "direct-joint": DirectJoint,
    "direct-rb": DirectRaoBlackwell,
    "exact": Exact,
    "gumbel-softmax": GumbelSoftmax,
    "leg": LocalExpectation,
    "reinforce": Reinforce,
    "rloo": LeaveOneOut,
    "st-gumbel-softmax": StraightThroughGumbelSoftmax,
}
