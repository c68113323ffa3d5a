"""What PyTorch's autograd leaves out.

Gradients read, saved memory counted, training steps compared side by side; every public name is
importable from here. Importing loads torch, NumPy and the standard library only.
"""

from autograd_lib.applications import Solution, solve_ode
from autograd_lib.benchmark import Comparison, Ratio, compare
from autograd_lib.callbacks import lightning_callback, transformers_callback
from autograd_lib.checkpointing import CheckpointPlan, plan_checkpoints
from autograd_lib.command import Task
from autograd_lib.config import AutogradConfig, Settings, load_config
from autograd_lib.examples import AdvancedAutogradExamples, AutogradExamples
from autograd_lib.functions import (
    CustomAutogradFunction,
    CustomLossFunction,
    clip_gradient,
    fixed_point,
    linear_cross_entropy,
    log1mexp,
    low_memory_gelu,
    low_memory_relu,
    low_memory_silu,
    reverse_gradient,
    safe_norm,
    safe_sqrt,
    scale_gradient,
    straight_through,
)
from autograd_lib.gradients import (
    AutogradUtils,
    GradientStatistics,
    check_gradients_exist,
    compute_gradient_statistics,
    enable_gradients,
    get_gradient_norms,
    missing_gradients,
)
from autograd_lib.higher_order import (
    DerivativeReport,
    DerivativeTower,
    Estimate,
    biharmonic,
    derivative_tower,
    fisher_product,
    ggn_product,
    hessian_diagonal,
    hessian_trace,
    hvp,
    jet,
    jet_rule,
    laplacian,
    linearize_hvp,
    taylor_solution,
    top_eigenvalues,
    verify_derivatives,
)
from autograd_lib.memory import (
    SavedTensors,
    peak_bytes,
    plot_graph,
    plot_memory,
    saved_tensors,
)
from autograd_lib.models import CustomCNNModel, CustomRNNModel, CustomTransformerModel
from autograd_lib.monitor import (
    GradientMonitor,
    Issue,
    NoiseScale,
    plot_gradient_flow,
    plot_gradient_heatmap,
    plot_gradient_histograms,
)
from autograd_lib.nonfinite import NonFinite, NonFiniteGuard, find_nonfinite
from autograd_lib.report.dashboard import GradientDashboard
from autograd_lib.report.explorer import Explorer, explore
from autograd_lib.training import AutogradTrainingSystem
from autograd_lib.tuning import (
    GradientReport,
    Trial,
    TuningReport,
    autotune,
    verify_gradients,
)

__version__ = "0.1.0"

__all__ = [
    "AdvancedAutogradExamples",
    "AutogradConfig",
    "AutogradExamples",
    "AutogradTrainingSystem",
    "AutogradUtils",
    "CheckpointPlan",
    "Comparison",
    "CustomAutogradFunction",
    "CustomCNNModel",
    "CustomLossFunction",
    "CustomRNNModel",
    "CustomTransformerModel",
    "DerivativeReport",
    "DerivativeTower",
    "Estimate",
    "Explorer",
    "GradientDashboard",
    "GradientMonitor",
    "GradientReport",
    "GradientStatistics",
    "Issue",
    "NoiseScale",
    "NonFinite",
    "NonFiniteGuard",
    "Ratio",
    "SavedTensors",
    "Settings",
    "Solution",
    "Task",
    "Trial",
    "TuningReport",
    "autotune",
    "biharmonic",
    "check_gradients_exist",
    "clip_gradient",
    "compare",
    "compute_gradient_statistics",
    "derivative_tower",
    "enable_gradients",
    "explore",
    "find_nonfinite",
    "fisher_product",
    "fixed_point",
    "get_gradient_norms",
    "ggn_product",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "jet",
    "jet_rule",
    "laplacian",
    "lightning_callback",
    "linear_cross_entropy",
    "linearize_hvp",
    "load_config",
    "log1mexp",
    "low_memory_gelu",
    "low_memory_relu",
    "low_memory_silu",
    "missing_gradients",
    "peak_bytes",
    "plan_checkpoints",
    "plot_gradient_flow",
    "plot_gradient_heatmap",
    "plot_gradient_histograms",
    "plot_graph",
    "plot_memory",
    "reverse_gradient",
    "safe_norm",
    "safe_sqrt",
    "saved_tensors",
    "scale_gradient",
    "solve_ode",
    "straight_through",
    "taylor_solution",
    "top_eigenvalues",
    "transformers_callback",
    "verify_derivatives",
    "verify_gradients",
]
