import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssr_deepspeed.kernels import fused_columns, launch
from ssr_deepspeed.ot import sinkhorn, solve
from ssr_deepspeed.ot.problem import prepare

pytest.importorskip("triton")
# The interpreter computes in numpy, which warns where a GPU gives the same infinity or NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
TINY = torch.finfo(torch.float64).tiny


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """The torch version to compare with is the one that devices run."""
    monkeypatch.setattr(sinkhorn, "readable", lambda tensor: False)


class Case:
    """One problem at entropy 0.5, as the kernel and as torch take it."""

    def __init__(self, tokens, experts, scale=2.0, mask=None):
        rows = prepare(scale * torch.randn(tokens, experts), 0.5, mask, None)
        self.scaled_TE, self.weight_T = rows.scores_TE / 0.5, rows.weight_T
        self.torch_columns = sinkhorn.column_sums(rows, 0.5)

    def kernel_columns(self, potential_E):
        return fused_columns(self.scaled_TE, potential_E, self.weight_T)

    def exact(self, potential_E):
        """Column sums in fp64, in logarithms."""
        log_plan_TE = torch.log_softmax(self.scaled_TE.double() + potential_E.double(), dim=1)
        return torch.logsumexp(log_plan_TE + self.weight_T.double().log().unsqueeze(1), dim=0).exp()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (150, 3), (133, 8), (70, 64), (33, 100), (1, 256), (19, 256), (5, 1000)]
)
def test_the_kernel_sums_columns_like_torch(tokens, experts, masked):
    case = Case(tokens, experts, mask=torch.arange(tokens) % 3 != 1 if masked else None)
    potential_E = torch.randn(experts)
    column_E = case.kernel_columns(potential_E)
    assert column_E.dtype == torch.float64
    torch.testing.assert_close(column_E, case.torch_columns(potential_E), rtol=2e-5, atol=0)
    assert float(column_E.sum()) == pytest.approx(float(case.weight_T.sum()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 1e4])
def test_the_kernels_error_is_at_most_twice_that_of_torch(scale):
    case, potential_E = Case(200, 32, scale), torch.randn(32)
    truth = case.exact(potential_E)
    error, torchs = (
        float(((found.clamp_min(TINY) - truth.clamp_min(TINY)) / truth.clamp_min(TINY)).abs().max())
        for found in (case.kernel_columns(potential_E), case.torch_columns(potential_E))
    )
    assert error <= 2 * torchs


@pytest.mark.parametrize("programs", [1, 2, 1024])
def test_columns_that_fp32_cannot_hold_are_summed_all_the_same(monkeypatch, programs):
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    case = Case(300, 16, scale=1.0)
    potential_E = torch.randn(16)
    potential_E[3], potential_E[5], potential_E[7] = -80.0, -300.0, -2000.0
    found, truth = case.kernel_columns(potential_E), case.exact(potential_E)
    assert 1e-200 < float(truth[5]) < 1e-100
    assert float(found[7]) == float(truth[7]) == 0
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=0)


def test_rows_of_weight_zero_add_nothing_whatever_they_contain():
    scaled = torch.randn(70, 64)
    weight = (torch.arange(70) % 2).float()
    kept = fused_columns(scaled[weight == 1], torch.zeros(64), torch.ones(35))
    spoilt = scaled.clone()
    spoilt[weight == 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).repeat(16)
    torch.testing.assert_close(fused_columns(spoilt, torch.zeros(64), weight), kept, rtol=1e-6, atol=0)
    assert torch.equal(fused_columns(spoilt, torch.zeros(64), torch.zeros(70)), torch.zeros(64, dtype=torch.float64))


def test_programs_that_take_several_tiles_find_the_same(monkeypatch):
    case, potential_E = Case(300, 64), torch.randn(64)
    many = case.kernel_columns(potential_E)
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    two = case.kernel_columns(potential_E)
    torch.testing.assert_close(two, many, rtol=1e-6, atol=0)


def test_no_tokens_have_columns_of_zero():
    assert fused_columns(torch.zeros(0, 5), torch.zeros(5), torch.zeros(0)).tolist() == [0.0] * 5


def test_sinkhorn_with_the_kernel_finds_the_same_potentials(monkeypatch):
    scores = 2 * torch.randn(120, 8) + torch.arange(8.0)
    plain = solve(scores, 0.5, tolerance=1e-4, max_iterations=20)

    monkeypatch.setattr(sinkhorn, "usable", lambda tensor, experts: True)
    fused = solve(scores, 0.5, tolerance=1e-4, max_iterations=20)
    assert torch.equal(fused.iterations, plain.iterations)
    torch.testing.assert_close(fused.potentials, plain.potentials, rtol=0, atol=1e-4)


def test_torch_knows_the_operator():
    case = Case(20, 8)
    torch.library.opcheck(torch.ops.ssr_deepspeed.columns.default, (case.scaled_TE, torch.zeros(8), case.weight_T))
    with FakeTensorMode():
        column_E = fused_columns(torch.empty(20, 8), torch.empty(8), torch.empty(20))
        assert (column_E.shape, column_E.dtype) == ((8,), torch.float64)
    compiled = torch.compile(fused_columns, fullgraph=True, backend="eager")
    found = [sums(case.scaled_TE, torch.ones(8), case.weight_T) for sums in (compiled, fused_columns)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4).double(), torch.zeros(4), torch.zeros(3)), "scaled scores are torch.float64"),
        ((torch.zeros(3, 4), torch.zeros(3), torch.zeros(3)), r"potential must be torch.float32 \[4\]"),
        ((torch.zeros(3, 4), torch.zeros(4), torch.zeros(4)), r"weight must be torch.float32 \[3\]"),
    ],
)
def test_what_no_kernel_takes_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_columns(*arguments)
