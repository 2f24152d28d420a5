"""Recipes: what a file may hold, what errors say, and which rule decides about which tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from arrowquant_gpu import cli
from arrowquant_gpu.errors import PolicyError
from arrowquant_gpu.formats import TensorInfo
from arrowquant_gpu.models import ROLES
from arrowquant_gpu.pipeline.policy import Policy
from arrowquant_gpu.pipeline.recipe import MAX_BYTES, Recipe, schema_text, split_tensor_scheme, tensor_scheme

SCHEMA = json.loads(schema_text())
LLAMA = {"model_type": "llama"}
NAMES = {
    "lm_head.weight": (64, 16),
    "model.embed_tokens.weight": (64, 16),
    **{
        f"model.layers.{i}.{part}": (16, 16)
        for i in range(4)
        for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    },
    **{f"model.layers.{i}.input_layernorm.weight": (16,) for i in range(4)},
    "model.layers.0.mlp.gate.weight": (4, 16),
    "position_ids": (1, 16),
}


def error_of(text: str | bytes) -> str | None:
    """The message of the PolicyError that a text gives, None for a recipe."""
    try:
        Recipe.parse(text)
    except PolicyError as e:
        return str(e)
    return None


def infos(names: dict[str, tuple[int, ...]] = NAMES) -> list[TensorInfo]:
    dtypes = {"position_ids": "int64"}
    return [TensorInfo(n, dtypes.get(n, "bfloat16"), s, Path("m.safetensors"), 0, 0) for n, s in names.items()]


def policy(rules: str, **options: Any) -> Policy:
    return Policy(NAMES, LLAMA, rules=Recipe.parse(f"version: 1\nrules: {rules}").rules, **options)


def schemes(found: Policy) -> dict[str, str]:
    """Scheme, "default" or "kept" of each tensor."""
    decisions = {info.name: found.decide(info) for info in infos()}
    return {n: (d.scheme.id if d.scheme else "default") if d.quantize else "kept" for n, d in decisions.items()}


class TestFiles:
    def test_everything_that_a_recipe_may_hold(self, tmp_path: Path) -> None:
        path = tmp_path / "mixed.yaml"
        path.write_text(
            "version: 1\nformat: parquet\nscheme: int4_g64\nrules:\n"
            "- match: 'down_proj'\n  layers: [0, -1]\n  role: mlp\n  scheme: int8_channel\n  reason: outliers\n"
            "- role: shared expert\n  keep: true\n"
        )
        recipe = Recipe.read(path)
        assert (recipe.name, recipe.format, recipe.scheme) == ("mixed.yaml", "parquet", "int4_g64")
        first, second = recipe.rules
        assert (first.match.pattern, first.layers, first.role) == ("down_proj", (0, -1), "mlp")
        assert (first.scheme.id, first.reason, first.where) == ("int8_channel", "outliers", "rule 1 of mixed.yaml")
        assert (second.match, second.layers, second.role, second.scheme) == (None, None, "shared expert", None)

    def test_json_is_yaml_and_the_rules_may_be_left_out(self) -> None:
        assert Recipe.parse('{"version": 1, "scheme": "q4_k_m"}') == Recipe("recipe", (), None, "q4_k_m")

    def test_of(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text("version: 1")
        recipe = Recipe("mine")
        assert Recipe.of(recipe) is recipe
        assert Recipe.of(tmp_path / "r.yaml") == Recipe.of(str(tmp_path / "r.yaml")) == Recipe("r.yaml")
        assert Recipe.of(None).rules == ()

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyError, match=r"none\.yaml: this recipe cannot be read: No such file"):
            Recipe.read(tmp_path / "none.yaml")
        with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
            Recipe.read(tmp_path)
        (tmp_path / "big.yaml").write_bytes(b"version: 1" + b" " * MAX_BYTES)
        with pytest.raises(PolicyError, match="more than 1048576 bytes"):
            Recipe.read(tmp_path / "big.yaml")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "r.yaml: None is not of type object"),
            ("rules: []", "r.yaml: it needs the field version"),
            ("version: 2", "r.yaml: version: 2: only 1 is allowed"),
            ("version: true", "r.yaml: version: True: only 1 is allowed"),
            ("version: 1\nrule: []", "r.yaml: 'rule': the fields here are version, format, scheme, rules"),
            ("version: 1\nscheme: int4", r"r.yaml: scheme: 'int4' is not a scheme.* or a mix: .*q4_k_m"),
            ("version: 1\nrules: {match: a}", r"r.yaml: rules: \{'match': 'a'\} is not of type array"),
            ("- {match: a, shceme: int4_g32}", r"rule 2: 'shceme': the fields here are match, role, layers, scheme"),
            ("- {match: a, scheme: int4}", r"rule 2: scheme: 'int4' is not a scheme\. A scheme is int"),
            ("- {match: a, scheme: q4_k_m}", r"rule 2: scheme: .* A mix is for the whole model"),
            ("- {match: '(', keep: true}", r"rule 2: match: '\(' is not a regular expression: missing \)"),
            ("- {match: '', keep: true}", "rule 2: match: it is empty"),
            ("- {match: 7, keep: true}", "rule 2: match: 7 is not of type string"),
            ("- {role: experts, keep: true}", "rule 2: role: 'experts' is none of attention, mlp, expert, shared"),
            ("- {layers: [0, one], keep: true}", "rule 2: layers, item 2: 'one' is not of type integer"),
            ("- {layers: [], keep: true}", "rule 2: layers: it is empty"),
            ("- {keep: true}", "rule 2: it needs match, role or layers"),
            ("- {match: a}", "rule 2: it needs either scheme or keep: true, and not both"),
            (
                "- {match: a, keep: true, scheme: int4_g32}",
                "rule 2: it needs either scheme or keep: true, and not both",
            ),
            ("- {match: a, keep: false}", "rule 2: keep: False: only true is allowed"),
            ("- a", "rule 2: 'a' is not of type object"),
            ("- {match: a, match: b, keep: true}", "'match' is there twice in .*line 4"),
            ("- &x {match: a, keep: true}\n- *x", r"aliases \(\*\) are not read"),
            ("- [", "not YAML that can be read: while parsing a flow node"),
            ("- !!python/name:os.system {}", "could not determine a constructor for the tag"),
            ("- " + "[" * 5000, "nested too deeply"),
            ("- 2001-99-99", "not YAML that can be read: month must be in"),
            ("- " + "9" * 5000, "not YAML that can be read: Exceeds the limit"),
        ],
    )
    def test_errors_name_the_place_and_what_is_allowed(self, text: str, words: str) -> None:
        if text.startswith("-"):
            text = f"version: 1\nrules:\n- {{role: head, keep: true}}\n{text}"
        with pytest.raises(PolicyError, match=words):
            Recipe.parse(text, "r.yaml")

    @given(st.one_of(st.text(max_size=200), st.binary(max_size=200)))
    @settings(max_examples=200, deadline=None)
    def test_any_text_is_a_recipe_or_a_policy_error(self, text: str | bytes) -> None:
        error = error_of(text)
        assert error is None or error.startswith("recipe: ")

    VALUES = st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-3, 3),
            st.floats(),
            st.sampled_from(["int4_g128", "int8_channel", "q4_k_m", "layers", "(", "a+", "mlp", "head", "parquet", ""]),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
        max_leaves=4,
    )
    FIELDS = ("match", "role", "layers", "scheme", "keep", "reason", "kepe")
    RULE = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)
    RECIPE = st.fixed_dictionaries(
        {"version": st.one_of(st.just(1), VALUES)},
        optional={"format": VALUES, "scheme": VALUES, "rules": st.one_of(VALUES, st.lists(RULE, max_size=3))},
    )

    @given(st.one_of(RECIPE, VALUES))
    @settings(max_examples=200, deadline=None)
    def test_what_is_nearly_a_recipe(self, content: Any) -> None:
        """Read without an error exactly where jsonschema, and then the schemes and expressions, find nothing wrong."""
        valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(content)
        error = error_of(yaml.safe_dump(content))
        assert valid or error is not None
        assert not valid or error is None or "is not a scheme" in error or "is not a regular expression" in error

    LAYERS = st.one_of(st.none(), st.lists(st.integers(-4, 4), min_size=1, max_size=3))
    GOOD = st.builds(
        lambda match, role, layers, scheme, reason: {
            **({"match": match} if match or not (role or layers) else {}),
            **({"role": role} if role else {}),
            **({"layers": layers} if layers else {}),
            **({"scheme": scheme} if scheme else {"keep": True}),
            **({"reason": reason} if reason else {}),
        },
        st.sampled_from(["", "a+", r"layers\.[0-3]\.", "é$"]).map(lambda text: text or "b"),
        st.one_of(st.none(), st.sampled_from(ROLES)),
        LAYERS,
        st.one_of(st.none(), st.sampled_from(["int4_g128", "int8_channel", "nf4_g64"])),
        st.one_of(st.none(), st.text(max_size=9)),
    )

    @given(st.lists(GOOD, max_size=4))
    @settings(max_examples=60, deadline=None)
    def test_what_is_written_is_what_is_read(self, rules: list[dict[str, Any]]) -> None:
        found = Recipe.parse(yaml.safe_dump({"version": 1, "rules": rules})).rules
        for rule, read in zip(rules, found, strict=True):
            scheme = {"keep": True} if read.scheme is None else {"scheme": read.scheme.id}
            fields = {"match": read.match and read.match.pattern, "role": read.role, "reason": read.reason}
            fields["layers"] = None if read.layers is None else list(read.layers)
            assert rule == {**{k: v for k, v in fields.items() if v}, **scheme}

    def test_the_examples_of_the_documents_are_recipes(self) -> None:
        text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
        (example,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert len(Recipe.parse(example).rules) == 3
        assert ", ".join(f"`{role}`" for role in ROLES) in " ".join(text.split())

    def test_the_schema_is_one_and_knows_the_roles(self) -> None:
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        assert SCHEMA["$defs"]["rule"]["properties"]["role"]["enum"] == list(ROLES)
        done = CliRunner().invoke(cli.app, ["recipe-schema"])
        assert (done.exit_code, json.loads(done.stdout)) == (0, SCHEMA)


class TestDecisions:
    def test_the_first_rule_that_fits_decides(self) -> None:
        found = schemes(
            policy(
                "[{match: 'layers.1.*down', keep: true}, {match: down, scheme: int8_channel}, "
                "{role: mlp, scheme: int8_g32}, {layers: [0], scheme: int6_g32}]"
            )
        )
        assert found["model.layers.1.mlp.down_proj.weight"] == "kept"
        assert found["model.layers.0.mlp.down_proj.weight"] == "int8_channel"
        assert found["model.layers.0.mlp.up_proj.weight"] == "int8_g32"
        assert found["model.layers.0.self_attn.q_proj.weight"] == "int6_g32"
        assert found["model.layers.1.self_attn.q_proj.weight"] == "default"

    def test_all_that_a_rule_names_must_fit(self) -> None:
        found = schemes(policy("[{match: proj, role: mlp, layers: [1, -1], scheme: int8_channel}]"))
        changed = {n for n, scheme in found.items() if scheme == "int8_channel"}
        assert changed == {f"model.layers.{i}.mlp.{p}_proj.weight" for i in (1, 3) for p in ("up", "down")}

    def test_a_role_or_an_expression_quantizes_what_the_table_keeps(self) -> None:
        found = schemes(policy("[{role: embedding, scheme: int8_channel}, {match: lm_head, scheme: int6_g16}]"))
        assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == ("int8_channel", "int6_g16")

    def test_layers_alone_change_only_what_is_quantized(self) -> None:
        found = schemes(policy("[{layers: [0], scheme: int8_channel}]"))
        assert {n for n, s in found.items() if s == "int8_channel"} == {
            n for n in found if "layers.0" in n and "_proj" in n
        }
        assert (found["model.layers.0.mlp.gate.weight"], found["model.layers.0.input_layernorm.weight"]) == (
            "kept",
            "kept",
        )

    def test_a_norm_is_no_matrix_and_integers_are_no_weights(self) -> None:
        found = schemes(policy("[{match: '.', scheme: int8_channel}]"))
        assert {n for n, s in found.items() if s == "kept"} == {n for n in NAMES if "norm" in n} | {"position_ids"}

    def test_ignore_and_include_come_first(self) -> None:
        found = schemes(
            policy(
                "[{match: lm_head, scheme: int8_channel}, {role: mlp, keep: true}]",
                include=["lm_head", r"layers\.0\.mlp\.up"],
                ignore=["embed", r"layers\.2\."],
            )
        )
        # Included, with the scheme of the rule that fits, or the default.
        assert (found["lm_head.weight"], found["model.layers.0.mlp.up_proj.weight"]) == ("int8_channel", "default")
        assert found["model.layers.1.mlp.up_proj.weight"] == "kept"
        assert found["model.layers.2.self_attn.q_proj.weight"] == "kept"

    def test_reasons(self) -> None:
        found = policy("[{role: embedding, scheme: int8_channel, reason: large}, {layers: [3], keep: true}]")
        reasons = {info.name: found.decide(info).reason for info in infos()}
        assert reasons["model.embed_tokens.weight"] == "embedding; rule 1 of recipe: large"
        assert reasons["model.layers.3.mlp.up_proj.weight"] == "kept by rule 2 of recipe"
        assert reasons["model.layers.2.mlp.up_proj.weight"] == "linear weight"

    def test_an_expression_that_matches_nothing_is_an_error(self) -> None:
        with pytest.raises(PolicyError, match=r"rule 2 of recipe: match 'dwn_proj' matches none .* Near it: down_proj"):
            policy("[{match: up_proj, keep: true}, {match: dwn_proj, keep: true}]")

    def test_layers_that_fit_nothing_are_an_error(self) -> None:
        with pytest.raises(PolicyError, match=r"rule 1 of recipe: it fits none .* in layers 4, 7; .* layers 0 to 3"):
            policy("[{layers: [4, 7], keep: true}]").check(infos())
        with pytest.raises(PolicyError, match="none has a layer's number"):
            Policy(["a.weight"], rules=Recipe.parse("version: 1\nrules: [{layers: [0], keep: true}]").rules).check(
                infos({"a.weight": (8, 8)})
            )

    def test_a_role_that_is_not_there_and_a_rule_that_comes_too_late_are_warnings(self) -> None:
        found = policy("[{role: router, keep: true}, {role: modulation, keep: true}, {match: 'mlp.gate', keep: true}]")
        assert found.check(infos()) == [
            "rule 2 of recipe fits no tensor: none that it could fit has the role modulation.",
            "rule 3 of recipe decides nothing: rules before it fit all of its tensors.",
        ]


class TestTensorScheme:
    def test_split(self) -> None:
        assert split_tensor_scheme(r"a(?=b)\.weight=int8_channel") == (r"a(?=b)\.weight", "int8_channel")
        for text in ("int8_channel", "=int8_channel", "a="):
            with pytest.raises(PolicyError, match="write RE=SCHEME"):
                split_tensor_scheme(text)

    def test_errors(self) -> None:
        with pytest.raises(PolicyError, match=r"--tensor-scheme \(=int8_channel: '\(' is not a regular expression"):
            tensor_scheme("(", "int8_channel")
        with pytest.raises(PolicyError, match=r"--tensor-scheme a=int9: 'int9' is not a scheme"):
            tensor_scheme("a", "int9")
        with pytest.raises(PolicyError, match=r"--tensor-scheme zzz=int8_channel: match 'zzz' matches none"):
            Policy(NAMES, rules=[tensor_scheme("zzz", "int8_channel")])
