"""The control plane in plain Python on the caller's clock: specification of the compiled one, and its oracle."""

from xlpk.simulator.control import ControlPlane
from xlpk.simulator.outcomes import Outcomes, Recorded, Synthetic
from xlpk.simulator.replay import replay
from xlpk.simulator.rules import Rules, SimRequest
from xlpk.simulator.step import StepPlan
from xlpk.simulator.trace import Trace

__all__ = ["ControlPlane", "Outcomes", "Recorded", "Rules", "SimRequest", "StepPlan", "Synthetic", "Trace", "replay"]
