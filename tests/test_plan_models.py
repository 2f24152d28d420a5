"""Plans of models of the table: recipes, mixes, fused parts, tied heads, and how much is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arrowquant_gpu.errors import FormatError, PolicyError, SchemeError
from arrowquant_gpu.formats import Entry, TensorInfo
from arrowquant_gpu.pipeline import Plan, make_plan, quantize_checkpoint
from arrowquant_gpu.pipeline.plan import check_share
from arrowquant_gpu.pipeline.recipe import Recipe
from arrowquant_gpu.pipeline.widths import Widths
from arrowquant_gpu.schemes import Scheme

from .fixtures import llama_shapes, tiny_llama
from .test_plan import Headers

LLAMA = llama_shapes(layers=16, hidden=256, intermediate=512, heads=4, kv_heads=2, vocab=1000)
CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
Q, K, V, GATE, UP, DOWN = (
    f"model.layers.0.{part}_proj.weight"
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
)


class AnySink:
    """A sink that carries everything but the tensors in `refuses`."""

    def __init__(self, name: str = "any", refuses: tuple[str, ...] = (), **attributes: Any) -> None:
        self.format, self.refuses = name, refuses
        self.__dict__.update(attributes)

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        if info.name in self.refuses:
            raise FormatError(f"no place for rows of {info.shape[-1]}")
        return scheme

    def n_bytes(self, entry: Entry) -> int:
        return 1


def plan(sink: AnySink, scheme: str = "int4_g128", source: Headers | None = None, **options: Any) -> Plan:
    return make_plan(source or Headers(LLAMA, config=CONFIG), sink, scheme, **options)


def schemes(found: Plan) -> dict[str, str | None]:
    return {e.info.name: e.scheme and e.scheme.id for e in found.entries}


def reasons(found: Plan) -> dict[str, str]:
    return {e.info.name: e.reason for e in found.entries}


class TestRecipes:
    RECIPE = Recipe.parse(
        "version: 1\nrules:\n- {match: down_proj, layers: [0], scheme: int8_channel}\n- {role: head, scheme: int6_g128}"
    )

    def test_rules_reach_the_entries(self) -> None:
        found = plan(AnySink(), recipe=self.RECIPE)
        want = {DOWN: "int8_channel", "lm_head.weight": "int6_g128", "model.embed_tokens.weight": None, Q: "int4_g128"}
        assert {name: schemes(found)[name] for name in want} == want
        assert reasons(found)["lm_head.weight"] == "output head; rule 2 of recipe"
        assert found.fixed == {DOWN, "lm_head.weight"}
        assert found.summary["stored_schemes"] == ["int4_g128", "int6_g128", "int8_channel"]

    def test_tensor_schemes_come_before_the_recipe(self) -> None:
        found = plan(AnySink(), recipe=self.RECIPE, tensor_schemes=[("layers.0.mlp", "int8_g32"), ("mlp", "int5_g32")])
        assert schemes(found)[DOWN] == "int8_g32"
        assert schemes(found)["model.layers.1.mlp.up_proj.weight"] == "int5_g32"
        assert reasons(found)[DOWN] == "linear weight; --tensor-scheme layers.0.mlp=int8_g32"
        assert found.warnings == ("rule 1 of recipe decides nothing: rules before it fit all of its tensors.",)

    def test_the_format_has_the_last_word(self) -> None:
        found = plan(AnySink(refuses=(DOWN,)), recipe=self.RECIPE)
        assert (schemes(found)[DOWN], reasons(found)[DOWN]) == (None, "no place for rows of 512")

    def test_measured_widths_leave_named_schemes_alone(self, tmp_path: Path) -> None:
        model = tiny_llama(tmp_path / "m")
        options: dict[str, Any] = {"format": "safetensors", "dry_run": True, "device": "reference"}
        rules = [(r"layers\.0\..*up_proj", "int3_g32"), ("embed_tokens", "nf4_g64")]
        found = quantize_checkpoint(
            model, tmp_path / "q", "int2_g32", tensor_schemes=rules, widths=Widths(min_accuracy=0.99), **options
        )
        assert schemes(found)["model.layers.0.mlp.up_proj.weight"] == "int3_g32"
        assert schemes(found)["model.embed_tokens.weight"] == "nf4_g64"
        assert schemes(found)["model.layers.1.mlp.up_proj.weight"] not in ("int2_g32", "int3_g32", None)
        with pytest.raises(SchemeError, match="nf4_g64 has one width; measured widths begin with an int scheme"):
            quantize_checkpoint(model, tmp_path / "q.parquet", "nf4_g64", widths=Widths(entropy=True), **options)
        with pytest.raises(SchemeError, match=r"raised to 8 bits only beside an int scheme, not nf4_g64"):
            quantize_checkpoint(model, tmp_path / "q.parquet", "nf4_g64", widths=Widths(sensitive="raise"), **options)

    def test_a_recipe_file_from_python_and_what_it_names(self, tmp_path: Path) -> None:
        model, path = tiny_llama(tmp_path / "m"), tmp_path / "r.yaml"
        path.write_text("version: 1\nformat: arrow\nscheme: int5_g32\nrules: [{role: mlp, keep: true}]")
        found = quantize_checkpoint(model, tmp_path / "q.arrow", recipe=path, dry_run=True)
        assert (found.format, found.summary["stored_schemes"]) == ("arrow", ["int5_g32"])
        assert reasons(found)[UP] == "kept by rule 1 of r.yaml"
        given = quantize_checkpoint(
            model, tmp_path / "q.parquet", "int8_g32", format="parquet", recipe=path, dry_run=True
        )
        assert (given.format, given.summary["stored_schemes"]) == ("parquet", ["int8_g32"])


class TestMixes:
    def test_gguf_by_hand(self) -> None:
        """Of 16 layers 0, 1, 4, 7, 10, 13, 14 and 15 have more bits; the head 6, the embedding as many as the base."""
        found = plan(AnySink("gguf", quantizes=frozenset({"embedding", "head"})), "q4_k_m")
        more = {0, 1, 4, 7, 10, 13, 14, 15}
        for name, scheme in schemes(found).items():
            layer = int(name.split(".")[2]) if ".layers." in name else -1
            bits = "q6_k" if layer in more and name.endswith(("v_proj.weight", "down_proj.weight")) else "q4_k"
            want = {"lm_head.weight": "q6_k", "model.embed_tokens.weight": "q4_k"}.get(name, bits)
            assert scheme == (None if "norm" in name else want), name
        assert (found.summary["scheme"], found.mix.file_type, found.scheme.id) == ("q4_k_m", 15, "q4_k")
        # On purpose: not a word about q, k and v.
        assert found.warnings == ()

    def test_an_embedding_that_is_the_head(self) -> None:
        sink = AnySink("gguf", quantizes=frozenset({"embedding", "head"}))
        shapes = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
        assert schemes(plan(sink, "q4_k_m", Headers(shapes, config=CONFIG)))["model.embed_tokens.weight"] == "q6_k"
        both = plan(sink, "q4_k_m", Headers(LLAMA, config=CONFIG | {"tie_word_embeddings": True}))
        assert schemes(both)["model.embed_tokens.weight"] == "q6_k"
        assert schemes(both)["lm_head.weight"] is None

    def test_sizes_of_config_json(self) -> None:
        moe = {"num_local_experts": 8, "num_attention_heads": 32, "num_key_value_heads": 8}
        found = schemes(plan(AnySink("gguf"), "q3_k_s", Headers(LLAMA, config=CONFIG | moe)))
        assert (found[K], found[V], found[Q]) == ("q8_0", "q8_0", "q3_k")
        found = schemes(plan(AnySink("gguf"), "q2_k_s", Headers(LLAMA, config=CONFIG | {"num_attention_heads": 8})))
        assert (found[K], found[V]) == ("q2_k", "q4_k")

    def test_a_rule_goes_before_the_mix(self) -> None:
        found = plan(AnySink("gguf"), "q4_k_m", tensor_schemes=[("v_proj", "q8_0")])
        assert (schemes(found)[V], schemes(found)[DOWN]) == ("q8_0", "q6_k")

    def test_only_gguf_has_mixes(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="q4_k_m is a mix of schemes, which only --format gguf has, not parquet"):
            plan(AnySink("parquet"), "q4_k_m")
        with pytest.raises(FormatError, match="only --format gguf has, not compressed-tensors"):
            quantize_checkpoint(tiny_llama(tmp_path / "m"), tmp_path / "q", "q4_k_m", dry_run=True)
        with pytest.raises(SchemeError, match="'q4_k_x' is not a scheme"):
            plan(AnySink("gguf"), "q4_k_x")


class TestRoles:
    def test_a_format_that_quantizes_embeddings_and_heads(self) -> None:
        found = plan(AnySink(quantizes=frozenset({"embedding", "head"})))
        assert schemes(found)["lm_head.weight"] == schemes(found)["model.embed_tokens.weight"] == "int4_g128"
        assert reasons(found)["lm_head.weight"] == "output head, which this format quantizes too"
        assert schemes(plan(AnySink(quantizes=frozenset({"embedding"}))))["lm_head.weight"] is None
        ignored = plan(AnySink(quantizes=frozenset({"embedding", "head"})), ignore=["lm_head"])
        assert reasons(ignored)["lm_head.weight"] == "ignored by --ignore lm_head"

    def test_an_unknown_architecture_says_so(self) -> None:
        found = plan(AnySink(), source=Headers(LLAMA, config={"model_type": "llama9"}))
        assert found.warnings == (
            "architecture llama9 is not in the table of models: generic rules decide which tensors are quantized.",
        )
        assert schemes(found) == schemes(plan(AnySink()))
        assert plan(AnySink()).warnings == ()
        # Nobody names one: there is nothing to know.
        assert plan(AnySink(), source=Headers({"a.weight": (8, 8)}, config={})).warnings == ()

    def test_a_tied_head_is_kept_whatever_is_asked_for(self) -> None:
        source = Headers(LLAMA, config=CONFIG | {"tie_word_embeddings": True})
        for options in ({}, {"include": ["lm_head"]}, {"tensor_schemes": [("lm_head", "int8_channel")]}):
            found = plan(AnySink(quantizes=frozenset({"embedding", "head"})), source=source, **options)
            assert schemes(found)["lm_head.weight"] is None, options
            words = "tied to model.embed_tokens.weight, which readers take in its place"
            assert reasons(found)["lm_head.weight"] == words


class TestFused:
    def test_where_one_part_is_refused_all_are_kept(self) -> None:
        found = plan(AnySink(refuses=(K, UP), fused_alike=True))
        kept = {name for name, scheme in schemes(found).items() if scheme is None and "_proj" in name}
        assert kept == {Q, K, V, GATE, UP}
        assert reasons(found)[K] == "no place for rows of 256"
        assert reasons(found)[V] == f"fused with {K}, which is kept: no place for rows of 256"
        assert found.warnings == (
            f"5 tensors that were to be quantized stay in float (first: {Q}): fused with {K}, which is kept: "
            f"no place for rows of 256 (2 tensors); no place for rows of 256 (2 tensors); and 1 other reasons, which "
            f"the plan has.",
        )

    def test_only_where_the_format_says_so(self) -> None:
        found = plan(AnySink(refuses=(K,)))
        assert (schemes(found)[K], schemes(found)[Q]) == (None, "int4_g128")
        kept, unequal = found.warnings
        assert (
            kept
            == f"1 tensors that were to be quantized stay in float (first: {K}): no place for rows of 256 (1 tensors)."
        )
        assert unequal.startswith("q_proj, k_proj, v_proj have different schemes in 1 layers")
        assert plan(AnySink(refuses=(K,), fused_alike=False)).warnings == (kept,)

    def test_what_the_user_ignores_does_not_keep_the_others(self) -> None:
        found = plan(AnySink(fused_alike=True), ignore=[r"layers\.0\..*k_proj"])
        assert (schemes(found)[K], schemes(found)[Q]) == (None, "int4_g128")
        assert len(found.warnings) == 1

    def test_experts_of_a_layer(self) -> None:
        experts = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
        shapes = {experts.format(i, e, p): (64, 64) for i in (0, 1) for e in (0, 1) for p in ("gate", "up", "down")}
        source = Headers(shapes, config={"model_type": "qwen3_moe"})
        refused = experts.format(0, 1, "down")
        found = schemes(plan(AnySink(refuses=(refused,), fused_alike=True), source=source))
        assert {name for name, scheme in found.items() if scheme is None} == {n for n in shapes if "layers.0" in n}
        (warning,) = plan(AnySink(), source=source, tensor_schemes=[(r"experts\.0\.up", "int8_g32")]).warnings
        assert "experts have different schemes in 2 layers (first: model.layers.0.mlp.experts.0." in warning
        # All kept: then nothing is quantized.
        shapes = {name: shape for name, shape in shapes.items() if "layers.0" in name}
        with pytest.raises(FormatError, match="no place for rows of 64"):
            plan(AnySink(refuses=(refused,), fused_alike=True), source=Headers(shapes, config=source.config))

    def test_parts_of_one_matrix_share_the_global_scale(self) -> None:
        found = {e.info.name: e.shared for e in plan(AnySink(), "nvfp4").entries}
        assert found[Q] == found[K] == found[V] == "model.layers.0.self_attn: q_proj, k_proj, v_proj"
        assert (found[GATE], found[DOWN]) == ("model.layers.0.mlp: gate_proj, up_proj", "")
        assert {e.shared for e in plan(AnySink()).entries} == {""}


class TestExpectQuantized:
    def test_the_share_by_hand(self) -> None:
        """16 layers of 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256 weights; two matrices of 1000 rows, 33 norms."""
        layers = 16 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
        share = layers / (layers + 2 * 1000 * 256 + 33 * 256)
        found = plan(AnySink())
        for expected in (None, 0.5, share - 1e-9):
            check_share(found, expected)
        with pytest.raises(PolicyError, match=rf"^{share:.1%} of the weights would be quantized") as caught:
            check_share(found, share + 1e-3)
        words = str(caught.value)
        assert "The largest of the 35 tensors that are kept: " in words
        assert words.index("lm_head.weight (2.6%): output head") < words.index(": 0-D or 1-D")

    def test_integers_do_not_count(self) -> None:
        source = Headers({"a.weight": (8, 8)})
        source.tensors["ids"] = TensorInfo("ids", "int64", (1000,), Path("model/model.safetensors"), 0, 8000)
        check_share(plan(AnySink(), source=source), 1.0)

    @pytest.mark.parametrize("share", [0, -0.5, 90, float("nan")])
    def test_what_is_no_share(self, share: float) -> None:
        with pytest.raises(PolicyError, match=r"over 0 and up to 1 \(100%\)"):
            check_share(plan(AnySink()), share)

    def test_nothing_is_written(self, tmp_path: Path) -> None:
        model = tiny_llama(tmp_path / "m")
        for dry_run in (True, False):
            with pytest.raises(PolicyError, match=r"90\.0% were expected"):
                quantize_checkpoint(model, tmp_path / "q", "int4_g32", expect_quantized=0.9, dry_run=dry_run)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
        quantize_checkpoint(model, tmp_path / "q", "int4_g32", expect_quantized=0.5, device="reference")

    def test_what_measured_widths_keep_is_not_quantized(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyError, match=r"of the weights would be quantized.*is under 0\.99999"):
            quantize_checkpoint(
                *(tiny_llama(tmp_path / "m"), tmp_path / "q.parquet", "int4_g32"),
                format="parquet",
                tensor_schemes=[("lm_head", "int8_g32")],
                expect_quantized=0.5,
                widths=Widths(min_accuracy=0.999999),
                device="reference",
            )
