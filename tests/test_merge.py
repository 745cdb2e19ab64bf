"""The laws of merges: what each method computes, in closed form, and what the report says of it."""

from itertools import pairwise

import pytest
import tiny
import torch
from jsonargparse import ArgumentParser
from peft import PeftModel
from torch import Tensor

from flowopd.models import AdapterSource, Merge
from flowopd.models.adapters.files import read_adapter, save_adapter
from flowopd.models.adapters.lora import Adapter, Factors, adapter_names, attach, take_adapter
from flowopd.models.adapters.merge import dare, inner, merge_report, ties, truncate, truncate_factors

FEED_FORWARD = ("attn.to_q", "ff.net.0.proj", "ff.net.2")
KINDS = [
    {"seed": 1, "rank": 4, "alpha": 8},
    {"seed": 2, "rank": 2, "alpha": 2, "targets": FEED_FORWARD},
    {"seed": 3, "rank": 3, "alpha": 12, "targets": r".*\.attn2?\.to_[qv]"},
    {
        "seed": 4,
        "targets": ("proj", "to_q"),
        "use_rslora": True,
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"to_q": 3},
    },
]
WEIGHTS = [0.5, 0.7, 0.2, 0.4]


@pytest.fixture(scope="module")
def experts(tiny_pipeline, tmp_path_factory):
    """Four adapters of different rank, strength and target, one with a convolution."""
    folder = tmp_path_factory.mktemp("experts")
    return [tiny.expert(folder / str(i), tiny_pipeline, **kind) for i, kind in enumerate(KINDS)]


@pytest.fixture(scope="module")
def alike(tiny_pipeline, tmp_path_factory):
    """Two adapters of one shape."""
    folder = tmp_path_factory.mktemp("alike")
    return [tiny.expert(folder / name, tiny_pipeline, seed=seed) for seed, name in enumerate(("text", "count"))]


@pytest.fixture
def fresh(tiny_pipeline):
    return tiny.loaded(tiny_pipeline)


@pytest.fixture
def state(fresh):
    return torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.3]), fresh.encode(["red 1", "blue 2"])


def change(adapter: Adapter, module: str) -> Tensor | int:
    """ΔW of a module."""
    if module not in adapter.parts:
        return 0
    a, b, scale = adapter.parts[module]
    return scale * b.flatten(1).double() @ a.flatten(1).double()


def changes(adapters: list[str], module: str) -> list[Tensor]:
    """ΔW of a module in every adapter, zero where it is left alone."""
    known = [change(read_adapter(folder), module) for folder in adapters]
    shape = next(value for value in known if isinstance(value, Tensor))
    return [value + torch.zeros_like(shape) for value in known]


def weighted(adapters: list[str], weights: list[float], module: str) -> Tensor:
    return sum(w * value for w, value in zip(weights, changes(adapters, module), strict=True))


# --------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("weights", [None, [0.5, 0.7, -0.2, 0.3]])
def test_an_exact_merge_is_the_mean_of_the_changes(experts, weights):
    merged, parts = Merge(experts, weights=weights).adapter(), [read_adapter(folder) for folder in experts]
    assert set(merged.parts) == {module for part in parts for module in part.parts}
    for module in merged.parts:
        mean = weighted(experts, weights or [1 / 4] * 4, module)
        torch.testing.assert_close(change(merged, module), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"method": "svd", "rank": 5}, {"method": "ties"}, {"method": "dare"}])
def test_every_merge_fits_peft(fresh, state, experts, tiny_pipeline, tmp_path, options):
    attach(fresh.network, "student", Merge(experts, **options).adapter(), trainable=True)
    save_adapter(take_adapter(fresh.network, "student"), tmp_path)
    theirs = PeftModel.from_pretrained(tiny.stock_transformer(tiny_pipeline), str(tmp_path)).eval()
    x, sigma, cond = state
    expected = theirs(x, cond.tokens, cond.pooled, 1000 * sigma, return_dict=False)[0]
    torch.testing.assert_close(fresh.velocity(*state, adapter="student"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "factors"])
def test_a_merge_of_one_adapter_is_that_adapter(experts, method):
    for folder in experts:
        merged, one = Merge([folder], method).adapter(), read_adapter(folder)
        assert merged.parts.keys() == one.parts.keys()
        for module, part in one.parts.items():
            assert all(torch.equal(*pair) for pair in zip(merged.parts[module][:2], part[:2], strict=True))
            assert merged.parts[module].scale == part.scale


def test_a_merge_of_an_adapter_with_itself_is_that_adapter(fresh, state, alike):
    attach(fresh.network, "merged", Merge([alike[0], alike[0]]).adapter())
    attach(fresh.network, "one", read_adapter(alike[0]))
    merged, one = (fresh.velocity(*state, adapter=name) for name in ("merged", "one"))
    torch.testing.assert_close(merged, one, rtol=0, atol=1e-6)
    assert adapter_names(fresh.network) == {"merged", "one"}


@pytest.mark.parametrize("method", ["exact", "svd", "ties", "dare"])
def test_adapters_that_agree_are_left_alone(alike, method):
    """Σ w copies of a change, whatever the method, if nothing is dropped."""
    merged, one = Merge([alike[0]] * 2, method, [0.25, 0.5], density=1.0).adapter(), read_adapter(alike[0])
    for module in one.parts:
        torch.testing.assert_close(change(merged, module), 0.75 * change(one, module), rtol=0, atol=1e-5)


def test_an_exact_merge_is_peft_s_concatenation(alike, tiny_pipeline):
    model = PeftModel.from_pretrained(tiny.stock_transformer(tiny_pipeline), alike[0], adapter_name="a")
    model.load_adapter(alike[1], "b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.9], "cat", combination_type="cat")
    merged = Merge(alike, weights=[0.3, 0.9]).adapter()
    for module in merged.parts:
        theirs = model.get_submodule(f"base_model.model.{module}").get_delta_weight("cat")
        torch.testing.assert_close(change(merged, module).float(), theirs, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- SVD


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_an_svd_merge_is_the_nearest_of_its_rank(experts, rank):
    """Eckart and Young: what is lost are the smaller singular values."""
    merged = Merge(experts, "svd", WEIGHTS, rank=rank).adapter()
    assert {part.rank for part in merged.parts.values()} == {rank}
    for module in merged.parts:
        exact = weighted(experts, WEIGHTS, module)
        lost = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
        distance = (change(merged, module) - exact).norm()
        assert distance.item() == pytest.approx(lost.item(), abs=1e-5)


def test_an_svd_merge_of_full_rank_is_exact(experts):
    merged, exact = Merge(experts, "svd", WEIGHTS).adapter(), Merge(experts, "exact", WEIGHTS).adapter()
    assert all(merged.parts[module].rank == part.rank for module, part in exact.parts.items())
    for module in exact.parts:
        torch.testing.assert_close(change(merged, module), change(exact, module), rtol=0, atol=1e-6)


def test_both_roads_to_singular_values_agree_and_balance_their_factors():
    a, b = torch.randn(5, 12, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    (a1, b1), (a2, b2) = truncate(b @ a, 3), truncate_factors(a, b, 3)
    torch.testing.assert_close(b1 @ a1, b2 @ a2)
    torch.testing.assert_close(a2.norm(dim=1), b2.norm(dim=0))


# -------------------------------------------------------------------------------------------------------- TIES and DARE


def test_ties_by_hand():
    """Trim to the largest half, elect the sign of the weighted sum, average those who agree, times Σ w."""
    first, second = torch.tensor([[4.0, -3.0, 0.5, 0.1]]), torch.tensor([[-1.0, -5.0, 2.0, 0.2]])
    #   trimmed: 4, -3, 0, 0 and 0, -5, 2, 0
    merged = ties([first, second], [1.0, 3.0], density=0.5)
    torch.testing.assert_close(merged, 4 * torch.tensor([[4.0, (-3 - 15) / 4, 2.0, 0.0]]))
    #   kept whole, entry 0: 4 - 3 > 0, so the first alone; entry 2 and 3 agree
    merged = ties([first, second], [1.0, 3.0], density=1.0)
    torch.testing.assert_close(merged, 4 * torch.tensor([[4.0, -18 / 4, 6.5 / 4, 0.7 / 4]]))


def test_ties_of_opposites_is_nothing():
    assert not ties([torch.ones(3, 3), -torch.ones(3, 3)], [0.5, 0.5], 1.0).any()


def test_ties_is_peft_s_up_to_its_scale():
    """peft averages what agrees after weighting; with equal weights that is ours but for Σ w."""
    from peft.utils.merge_utils import ties as peft_ties

    changes = [torch.randn(7, 5) for _ in range(3)]
    theirs = peft_ties(changes, torch.ones(3), density=0.4)
    torch.testing.assert_close(ties(changes, [1.0] * 3, 0.4), 3 * theirs)


def test_dare_keeps_the_exact_merge_on_average():
    changes, weights = [torch.randn(4, 3) for _ in range(2)], [0.4, 0.8]
    draws = torch.stack([dare(changes, weights, 0.25, seed) for seed in range(4000)])
    exact = 0.4 * changes[0] + 0.8 * changes[1]
    error = draws.var(0).sqrt() / 4000**0.5
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()


def test_dare_drops_and_rescales():
    drawn = dare([torch.ones(100, 100)], [0.5], density=0.2)
    assert set(drawn.unique().tolist()) == {0.0, 2.5}
    assert (drawn != 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(drawn, dare([torch.ones(100, 100)], [0.5], density=0.2))
    assert not torch.equal(drawn, dare([torch.ones(100, 100)], [0.5], density=0.2, seed=1))


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_merges_of_entries_are_written_at_the_rank_that_is_asked_for(experts, method):
    full = Merge(experts, method, WEIGHTS, rank=64, seed=3).adapter()  # no module here has more than 64 singular values
    small = Merge(experts, method, WEIGHTS, rank=2, seed=3).adapter()
    for module in full.parts:
        if method == "ties":
            dense = ties([value.float() for value in changes(experts, module)], WEIGHTS, 0.5).double()
            torch.testing.assert_close(change(full, module), dense, rtol=0, atol=1e-5)
        lost = torch.linalg.svdvals(change(full, module))[2:].square().sum().sqrt()
        assert (change(small, module) - change(full, module)).norm().item() == pytest.approx(lost.item(), abs=1e-4)
    assert {part.rank for part in small.parts.values()} == {2}


# ------------------------------------------------------------------------------------------------------------- factors


def test_averaged_factors_are_the_released_merge(alike):
    """mean(B)·mean(A) is not mean(B·A): about a half of two independent changes is lost."""
    released, exact = Merge(alike, "factors").adapter(), Merge(alike).adapter()
    first, second = (read_adapter(folder).tensors for folder in alike)
    for key, value in released.tensors.items():
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)
    kept = [(change(released, m) * change(exact, m)).sum() / change(exact, m).square().sum() for m in exact.parts]
    assert torch.stack(kept).mean().item() == pytest.approx(0.5, abs=0.1)


def test_factors_of_different_shape_cannot_be_averaged(experts):
    with pytest.raises(ValueError, match="one rank, scale and target; use method: exact"):
        Merge(experts, "factors").adapter()


# -------------------------------------------------------------------------------------------------------------- report


def orthogonal(row: int, size: float) -> Adapter:
    """ΔW with a single entry of ``size`` in its first column."""
    b = torch.zeros(4, 1)
    b[row] = size / 2
    return Adapter({"m": Factors(torch.tensor([[1.0, 0, 0]]), b, 2.0)})


def test_the_report_of_orthogonal_changes_by_hand():
    parts = [orthogonal(0, 3.0), orthogonal(1, 4.0)]
    merged = Adapter({"m": Factors(torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.5], [1.0], [0], [0]]), 2.0)})
    report = merge_report(["a", "b"], parts, [1.0, 0.5], merged)  # ΔW = 1 · 3 and 0.5 · 4
    assert report["a"] == {"weight": 1.0, "norm": 3.0, "cosine to a": 1.0, "cosine to b": 0.0, "kept": 1.0}
    assert report["b"] == {"weight": 0.5, "norm": 4.0, "cosine to a": 0.0, "cosine to b": 1.0, "kept": 0.5}
    norm = 13**0.5
    assert report["merge"] == pytest.approx({"norm": norm, "cosine to a": 3 / norm, "cosine to b": 2 / norm})


def test_the_product_of_changes_needs_no_whole_matrix(experts):
    first, second = (read_adapter(folder) for folder in experts[:2])
    shared = set(first.parts) & set(second.parts)
    dense = sum((change(first, m) * change(second, m)).sum() for m in shared)
    assert inner(first, second) == pytest.approx(dense.item())


def test_what_the_released_merge_keeps_is_less(alike):
    exact, released = Merge(alike).report(), Merge(alike, "factors").report()
    assert list(exact) == ["text", "count", "merge"]
    for name in ("text", "count"):
        assert exact[name]["kept"] == pytest.approx(0.5, abs=0.02)
        assert released[name]["kept"] == pytest.approx(0.25, abs=0.02)


def test_rows_of_the_report_have_names_of_their_own(tmp_path):
    sources = [AdapterSource("org/name", "A/lora"), AdapterSource("org/name", "B/lora"), "org/name"]
    assert Merge(sources).names() == ["org/name/A/lora", "org/name/B/lora", "org/name"]
    assert Merge(["x/text", "y/count"]).names() == ["text", "count"]
    assert Merge(["x/text", "x/text"]).names() == ["x/text (1)", "x/text (2)"]


# ----------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weights": [1.0]}, "2 adapters were given 1 weights; expected one each"),
        ({"adapters": []}, "at least one adapter folder"),
        ({"rank": 8}, "rank is 8, but only svd, ties and dare choose a rank"),
        ({"method": "svd", "rank": 0}, "rank is 0; expected at least 1"),
        ({"method": "ties", "density": 0.0}, "density is 0.0; expected a number above 0.0"),
        ({"method": "ties", "weights": [1.0, -1.0]}, "ties elects signs by weight, but one is -1.0; expected positive"),
    ],
)
def test_a_merge_refuses_numbers_that_do_not_fit(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Merge(**({"adapters": ["a", "b"]} | arguments))


def test_a_config_may_name_folders_and_parts_of_the_hub():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Merge, "start")
    adapters = ["runs/text/adapter", {"path": "org/name", "subfolder": "OCRTeacher/lora", "revision": "v1"}]
    config = parser.parse_object({"start": {"class_path": "flowopd.Merge", "init_args": {"adapters": adapters}}})
    merge = parser.instantiate_classes(config).start
    assert [str(source) for source in merge.adapters] == ["runs/text/adapter", "org/name/OCRTeacher/lora@v1"]
    assert all(isinstance(source, AdapterSource) for source in merge.adapters)


def test_singular_values_fall():
    a, b = truncate(torch.randn(8, 8), 5)
    norms = a.norm(dim=1).tolist()
    assert all(x >= y for x, y in pairwise(norms))
    assert b.shape == (8, 5)
