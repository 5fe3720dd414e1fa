"""A machine by its peak figures (`hardware` group), and what a step costs on it: a roofline a phase, and its drive.

conf/hardware/*.yaml has the figures with their sources. What follows from them is calculated: a run on such costs is a
projection until `xlpk calibrate` has seen the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from xlpk import layout
from xlpk.costs import KNOTS, PricedCosts, StepCosts
from xlpk.errors import InputError
from xlpk.kv import KVPlan
from xlpk.model import ModelConfig

ORCHESTRATIONS = ("persistent", "launched", "graph")
PARTS = ("weights", "kv", "compute", "filter", "launch", "sync", "copy", "barrier", "control")
_MATRICES = ("qkv", "output", "gate_up", "down")  # phases of a layer that read weights
# Times that top-p reads a row of logits: for the best, the mass, a digit of the threshold four times, the sample. Top-k
# alone leaves out the mass; both take eleven.
_FILTER_READS = 7
_COPIES = 2  # a step's, where the host launches: the descriptor to the device, the sampled tokens back


@dataclass
class Hardware:
    """The `hardware` group: what the simulator takes a device to be."""

    name: str = "cpu"
    memory_gb_per_s: float = 86.0  # peak read bandwidth, 10^9 bytes/s
    memory_share: float = 0.84  # of that peak, what kernels reach
    bf16_tflop_per_s: float = 1.13  # dense peak of 16-bit products, a multiply and an add counted as two
    fp32_tflop_per_s: float = 0.56  # dense peak of 32-bit products
    flop_share: float = 0.5  # of these peaks, what kernels reach
    teams: int = 2  # thread blocks at work, one an SM; threads on a CPU
    team_gb_per_s: float = 0.8  # what a team reads of a row of logits, which it filters alone
    memory_gb: float = 8.0  # capacity, 10^9 bytes
    bus_gb_per_s: float = 40.0  # to the host's memory and back, one way
    link_gb_per_s: float = 40.0  # to another device, one way
    barrier_us: float = 0.7  # `persistent`, a phase: from the last team's arrival until all are at work again
    kernel_gap_us: float = 0.7  # `launched`, a phase: the same between dependent kernels that are queued already
    graph_gap_us: float = 0.7  # `graph`, a phase: the same between nodes of a graph
    launch_us: float = 1.8  # of the host's time, a kernel
    graph_launch_us: float = 1.8  # of the host's time, a whole graph
    sync_us: float = 5.0  # from the end of a step until the host goes on
    copy_us: float = 0.1  # a copy between host and device, beside its bytes
    control_us: float = 1.4  # control of a step
    control_row_us: float = 0.012  # and of each of its rows
    publish_us: float = 1.0  # `persistent`: from the end of a step until the host sees its tokens
    submit_us: float = 1.0  # `persistent`: from submission until the loop sees it

    def check(self) -> None:
        """Raises InputError."""
        for item in fields(self):
            if item.name == "name":
                continue
            value = getattr(self, item.name)
            if item.name.endswith("_share"):
                if not 0 < value <= 1:
                    raise InputError(f"hardware.{item.name}", value, "above 0, at most 1")
            elif item.name.endswith("_us"):
                if not 0 <= value <= 1e6:
                    raise InputError(f"hardware.{item.name}", value, "0 to 1000000 us")
            elif not 0 < value <= 1e9:
                raise InputError(f"hardware.{item.name}", value, "above 0, at most 1e9")

    @property
    def bytes_per_ns(self) -> float:
        """Memory bandwidth that kernels reach."""
        return self.memory_gb_per_s * self.memory_share

    def flops_per_ns(self, dtype: str) -> float:
        """Rate that kernels reach on matrices in `dtype` (bf16, fp16 or fp32)."""
        peak = self.fp32_tflop_per_s if dtype == "fp32" else self.bf16_tflop_per_s
        return 1e3 * peak * self.flop_share


def hardware_costs(model: ModelConfig, dtype: str, plan: KVPlan, hardware: Hardware, orchestration: str) -> PricedCosts:
    """What steps of this model cost on that machine, split into PARTS and into the device's phases.

    A phase takes the larger of its weight bytes over the bandwidth and its products over the rate; activations are
    left out. Attention takes K and V over the bandwidth plus its products, since the formula is linear in both.
    Filtered rows are dealt to teams in turn, and each reads its row _FILTER_READS times. `persistent` pays a barrier
    a phase. The others pay the gap between dependent kernels, and once a step a wait, two copies and control, while
    the device idles; `launched` also its first launch, and what issuing the others takes beyond the device's own
    time.
    """
    if orchestration not in ORCHESTRATIONS:
        raise InputError("backend.orchestration", orchestration, f"one of {', '.join(ORCHESTRATIONS)}")
    rate = hardware.flops_per_ns(dtype)
    weight_ns = {name: size / hardware.bytes_per_ns for name, size in model.phase_bytes(dtype).items()}
    row_ns = {name: count / rate for name, count in _row_flops(model).items()}

    def excess(name: str) -> tuple[float, ...]:
        return _at_knots(lambda n: max(0.0, n * row_ns[name] - weight_ns[name]))

    phases = {name: StepCosts(fixed_ns=weight_ns[name], row_ns=excess(name)) for name in _MATRICES}
    head = weight_ns["lm_head"]
    phases["lm_head"] = StepCosts(sample_ns=_at_knots(lambda n: max(head, n * row_ns["lm_head"])))
    attended_flops = 4 * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    phases["attend"] = StepCosts(context_ns=plan.token_bytes / hardware.bytes_per_ns, attended_ns=attended_flops / rate)
    phases["move"] = StepCosts(move_ns=plan.page_bytes / hardware.bus_gb_per_s)
    # A staircase of rounds of all teams, exact at the knots of a curve: between two of them a round is smeared.
    row_filter_ns = _FILTER_READS * 4 * model.vocab_size / hardware.team_gb_per_s  # logits are fp32
    phases["filter"] = StepCosts(filter_ns=_at_knots(lambda n: -(-n // hardware.teams) * row_filter_ns))
    control = StepCosts(control_ns=1e3 * hardware.control_us, control_row_ns=1e3 * hardware.control_row_us)
    layers = sum(weight_ns[name] for name in _MATRICES)
    parts = {
        "weights": StepCosts(fixed_ns=layers, sample_ns=_at_knots(lambda _: head)),
        "kv": StepCosts(context_ns=phases["attend"].context_ns, move_ns=phases["move"].move_ns),
        "compute": StepCosts(
            row_ns=tuple(map(sum, zip(*map(excess, _MATRICES), strict=True))),
            sample_ns=excess("lm_head"),
            attended_ns=phases["attend"].attended_ns,
        ),
        "filter": phases["filter"],
        "control": control,
    }
    n_phases = phases_of_step(model.num_hidden_layers)
    if orchestration == "persistent":
        barrier_ns = 1e3 * hardware.barrier_us
        filtering = StepCosts(filter_ns=_at_knots(lambda _: barrier_ns))  # a step that filters has a phase more
        parts["barrier"] = StepCosts(fixed_ns=barrier_ns * (n_phases + 1)) + filtering  # one is control's
        host = StepCosts(publish_ns=1e3 * hardware.publish_us, submit_ns=1e3 * hardware.submit_us)
        phases |= _with_barriers(phases, model.num_hidden_layers, barrier_ns)
        phases["filter"] += filtering
    else:
        if orchestration == "graph":
            gap_ns = 1e3 * hardware.graph_gap_us
            parts["launch"] = StepCosts(fixed_ns=gap_ns * n_phases + 1e3 * hardware.graph_launch_us)
        else:
            gap_ns = 1e3 * hardware.kernel_gap_us
            gaps_ns = gap_ns * n_phases
            first_ns, issue_ns = 1e3 * hardware.launch_us, 1e3 * hardware.launch_us * (n_phases - 1)
            beyond = parts["compute"].row_ns
            busy_ns = tuple(layers + head + compute for compute in beyond)
            late = tuple(max(0.0, issue_ns - gaps_ns - busy) for busy in busy_ns)
            parts["launch"] = StepCosts(fixed_ns=first_ns + gaps_ns, row_ns=late)
        parts["launch"] += StepCosts(filter_ns=_at_knots(lambda _: gap_ns))
        parts["sync"] = StepCosts(fixed_ns=1e3 * hardware.sync_us)
        row_bytes = layout.ROW.dtype.itemsize / hardware.bus_gb_per_s
        parts["copy"] = StepCosts(fixed_ns=_COPIES * 1e3 * hardware.copy_us, row_ns=_at_knots(lambda n: n * row_bytes))
        host = StepCosts()
    phases["control"] = control
    total = StepCosts()
    for part in parts.values():
        total = total + part
    return PricedCosts(total + host, parts, phases)


def phases_of_step(num_hidden_layers: int) -> int:
    """Phases of a step that leaves out the optional ones: kernels that the host launches, or barriers but control's."""
    return sum(phase not in layout.OPTIONAL for phase, _ in layout.phase_sequence(num_hidden_layers))


def _row_flops(model: ModelConfig) -> dict[str, float]:
    """Two for each weight that a row meets, by phase."""
    out = dict.fromkeys((*_MATRICES, "lm_head"), 0.0)
    for name, size in model.phase_bytes("bf16").items():
        out[name] = float(size)  # two bytes a weight, two operations; norms and biases are not worth a correction
    return out


def _at_knots(value: Callable[[int], float]) -> tuple[float, ...]:
    return tuple(value(knot) for knot in KNOTS)


def _with_barriers(phases: dict[str, StepCosts], n_layers: int, barrier_ns: float) -> dict[str, StepCosts]:
    """The phases of a step with the barrier behind each: that is how the resident loop times them."""
    names = [layout.PHASE_NAMES[phase] for phase, _ in layout.phase_sequence(n_layers) if phase not in layout.OPTIONAL]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return {
        name: phases.get(name, StepCosts()) + StepCosts(fixed_ns=count * barrier_ns) for name, count in counts.items()
    }


def calibrated(costs: StepCosts) -> PricedCosts:
    """Measured costs: what a fit can tell apart, and one phase for the whole forward pass."""
    nothing = StepCosts()
    control = StepCosts(control_ns=costs.control_ns, control_row_ns=costs.control_row_ns)
    parts = {
        "step": StepCosts(fixed_ns=costs.fixed_ns),
        "rows": StepCosts(row_ns=costs.row_ns),
        "sampling": StepCosts(sample_ns=costs.sample_ns),
        "filter": StepCosts(filter_ns=costs.filter_ns),
        "kv": StepCosts(context_ns=costs.context_ns, attended_ns=costs.attended_ns, move_ns=costs.move_ns),
        "control": control,
    }
    parts = {name: part for name, part in parts.items() if part != nothing}
    forward = nothing
    for name, part in parts.items():
        forward = forward + part if name != "control" else forward
    return PricedCosts(costs, parts, {"forward": forward, "control": control})
