"""Random faults at random moments of whole runs: one typed error, nothing left over, and the same bytes in the end."""

from __future__ import annotations

import gc
import random
import shutil
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from arrowquant_gpu.errors import DeviceMemoryError
from arrowquant_gpu.formats.leftovers import JOURNAL
from arrowquant_gpu.formats.lines import read_lines

from .faults import KINDS, MADE, SURVIVED, Faults, Hang, Machine, Model, causes, watchdog
from .simulated_streams import SimulatedStreams
from .snapshots import differences, snapshot

PATIENCE = 60.0  # seconds; a run takes a fraction of one
SAMPLE, SOAK = 60, 10_000


# What this process holds now that a run may not leave behind.
Held = Callable[[], dict[str, Any]]


class Case(NamedTuple):
    """Runs of one model, each but the first continuing the one before: their faults, and what carries them out."""

    seed: int
    machine: Machine
    planned: list[dict[str, int]]


def case_of(seed: int) -> Case:
    rng = random.Random(seed)
    names = ["cuda:0", "cuda:1", "cuda:2", "cpu", "reference"]
    machine = Machine(
        ",".join(rng.sample(names, rng.choice([1, 1, 2, 3, 4]))),
        rng.randrange(1, 5),
        rng.choice([1, 1 << 12, 1 << 14, 1 << 16]),
        rng.choice([0.0, 0.0, 2e-4, 1e-3]),
        rng.randrange(1, 5),
        rng.choice(["auto", "auto", "buffered", "direct", "mapped"]),
        rng.choice([0.0, 0.0, 0.0, 2e-3, 2.0]),
    )
    planned = [_planned(rng, is_resumed=False)]
    if rng.random() < 0.3:
        planned.append(_planned(rng, is_resumed=True))
    return Case(seed, machine, planned)


def _planned(rng: random.Random, *, is_resumed: bool) -> dict[str, int]:
    kinds = [kind for kind in KINDS if kind != ("nan" if is_resumed else "verify")]
    chosen = rng.sample(kinds, rng.choice([0, 1, 1, 1, 1, 1, 1, 2, 2, 2]))
    return {kind: int(rng.expovariate(1 / max(KINDS[kind].typical, 0.1))) for kind in chosen}


@pytest.fixture
def held() -> Iterator[Held]:
    def now() -> dict[str, Any]:
        gc.collect()
        gc.freeze()  # what is still there: the next time there is little to look at
        return {
            "threads": sorted(t.name for t in threading.enumerate()),
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "maps": sum("model-0" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        }

    yield now
    gc.unfreeze()


class Outcome(NamedTuple):
    """How a run ended."""

    error: BaseException | None
    notes: tuple[str, ...] = ()
    resumed: int = 0


def carry_out(model: Model, target: Path, faults: Faults, machine: Machine, **options: Any) -> Outcome:
    """One run. The error that it ends with is returned without its frames, which keep everything alive."""
    threads = threading.enumerate()
    try:
        result = model.run(target, faults, machine, **options)
    except (Exception, KeyboardInterrupt) as e:
        left = [t.name for t in threading.enumerate() if t not in threads]
        assert not left, f"threads that were not joined: {left}"
        for part in (*causes(e), *faults.raised):
            part.__traceback__ = part.__context__ = None
        return Outcome(e)
    return Outcome(None, result.run.notes, result.run.resumed)


def check_error(error: BaseException, faults: Faults) -> None:
    """It is one of those that were injected, or a typed one that an injected one is the cause of."""
    types = tuple(KINDS[kind].error for kind in faults.reached)
    assert isinstance(error, types), f"{error!r} after {faults.reached}"
    if isinstance(error, DeviceMemoryError):
        assert "a single slot" in str(error), f"smaller slots were not tried: {error!r}"
    if "short read" in faults.reached and "became shorter while it was read" in str(error):
        return
    if "lost" in faults.reached and "the device is lost" in str(error):
        return
    if "nan" in faults.reached and "1 NaN and 0 infinite" in str(error):
        return
    assert any(e is injected for e in causes(error) for injected in faults.raised), f"{error!r} without its cause"


def check_leftovers(folder: Path, error: BaseException, before: list[Path]) -> bool:
    """Nothing, or one output with finished tensors, of which the error speaks. Returns which.

    before: what was left when the run began; an error that comes before it is looked at leaves it as it is
    """
    paths = sorted(folder.iterdir())
    note = " ".join(getattr(error, "__notes__", ()))
    if not paths:
        assert "--resume" not in note, "an error speaks of what is not there"
        return False
    (path,) = paths
    assert path.name.startswith(".out.arrowquant-"), f"{path.name} after {error!r}"
    assert path.suffix == ".tmp", path.name
    with (path / JOURNAL).open("rb") as f:
        n = len(read_lines(f.fileno())[0]) - 1
    assert n > 0, f"{path.name} has nothing to go on with"
    is_untouched = paths == before and "--resume" not in note
    assert is_untouched or note.startswith(f"{n} of "), f"{n} tensors are finished, and the error says {note!r}"
    return True


def check_output(model: Model, folder: Path) -> None:
    wrong = differences(snapshot(folder), model.expected)
    assert not wrong, f"wrong, missing or left over: {wrong}"


def run_case(case: Case, model: Model, folder: Path, held: Held, patience: float) -> Counter[str]:
    """All runs of a case, and one without faults; raises AssertionError for whatever is wrong. Returns counts."""
    counts: Counter[str] = Counter({"runs": 0})
    (folder / "out").mkdir(parents=True)
    beside = folder / "out"
    source, is_left, is_done = model.source, False, False
    if "nan" in case.planned[0]:
        source = model.with_nan(folder / "model-0-nan", random.Random(case.seed))
    before = held()
    for number, planned in enumerate([*case.planned, {}]):
        faults, streams = Faults(planned, case.seed), list[SimulatedStreams]()
        if source != model.source:
            faults.reached.add("nan")
        was_left = sorted(beside.iterdir())
        with watchdog(patience):
            outcome = carry_out(
                model,
                beside / "out",
                faults,
                case.machine,
                seed=case.seed,
                source=source,
                streams=streams,
                resume=number > 0,
            )
        counts["runs"] += 1
        counts.update(f"{kind}: reached" for kind in faults.reached)
        if (error := outcome.error) is None:
            check_output(model, beside)
            assert faults.reached <= SURVIVED, f"{faults.reached} did not matter"
            is_noted = any("out of memory" in note for note in outcome.notes)
            assert is_noted == bool(faults.reached), f"a note was expected after {faults.reached}: {outcome.notes}"
            assert is_left or not outcome.resumed
            counts.update(f"{kind}: survived" for kind in faults.reached)
            counts["resumed runs"] += outcome.resumed > 0
            counts["tensors not done again"] += outcome.resumed
            is_done = True
        else:
            check_error(error, faults)
            counts.update(f"{kind}: raised" for kind in faults.reached if isinstance(error, KINDS[kind].error))
            if (beside / "out").exists():
                # From its last rename on an output is complete, whatever comes then.
                check_output(model, beside)
                assert "interrupt" in faults.reached or "is complete" in str(error), error
                counts["errors of complete outputs"] += 1
                is_done = True
            else:
                is_left = check_leftovers(beside, error, was_left)
                is_nan = isinstance(error, KINDS["nan"].error)
                assert not (is_left and is_nan), "an error of the weights is kept, which would only come again"
                counts["outputs kept"] += is_left
        del outcome, error
        after = held()
        assert after == before, f"held before: {before}, after: {after}"
        assert sum(s.live("pinned") + s.live("allocate") for s in streams) == 0, "memory of a device is not freed"
        if is_done:
            break
    if not is_done:
        assert source != model.source, "a run without faults fails"
        check_again(case, model, beside, patience)
    shutil.rmtree(folder)
    return counts


def check_again(case: Case, model: Model, beside: Path, patience: float) -> None:
    """A source with NaN leaves nothing, and the good one is then quantized as ever."""
    assert sorted(beside.iterdir()) == []
    with watchdog(patience):
        outcome = carry_out(model, beside / "out", Faults({}), case.machine, seed=case.seed)
    assert outcome.error is None, outcome.error
    check_output(model, beside)


class Models:
    """Models made when they are first asked for."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        self.made: dict[int, Model] = {}

    def of(self, seed: int) -> Model:
        number = seed % self.n
        if number not in self.made:
            self.made[number] = Model(number, self.folder / f"m{number}")
        return self.made[number]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"), 12)


def run_cases(seeds: Iterator[int] | range, models: Models, folder: Path, held: Held, patience: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        case, model = case_of(seed), models.of(seed)
        try:
            counts += run_case(case, model, folder / str(seed), held, patience)
        except BaseException as e:
            e.add_note(f"{case}, model {model.format} {model.options} in pieces of {model.piece_bytes}")
            raise
    return counts


def report(counts: Counter[str], record_property: Callable[[str, object], None]) -> None:
    record_property("counts", dict(sorted(counts.items())))


def test_faults(models: Models, tmp_path: Path, held: Held, record_property: Callable[[str, object], None]) -> None:
    counts = run_cases(range(SAMPLE), models, tmp_path, held, PATIENCE)
    report(counts, record_property)
    assert sum(f"{kind}: reached" in counts for kind in KINDS) > len(KINDS) / 2
    assert counts["outputs kept"] > 0
    assert counts["tensors not done again"] > 0


@pytest.mark.soak
def test_many_faults(tmp_path: Path, held: Held, record_property: Callable[[str, object], None]) -> None:
    """Every kind of fault is reached, ends runs, and comes between finished tensors."""
    counts = run_cases(range(SOAK), Models(tmp_path / "models", 200), tmp_path, held, PATIENCE)
    report(counts, record_property)
    assert [kind for kind in KINDS if not counts[f"{kind}: reached"]] == []
    assert [kind for kind in KINDS if not counts[f"{kind}: raised"]] == []
    assert [kind for kind in sorted(SURVIVED) if not counts[f"{kind}: survived"]] == []
    assert counts["tensors not done again"] > SOAK / 10


# ---------------------------------------------------------------------------------------------------------------------
# The checks can fail: faults planted in the package, each found by a case that asks for it.


class Planted(NamedTuple):
    """`old` is replaced by `new` in a module of the package; one of the cases then fails with this message."""

    module: str
    old: str
    new: str
    planned: dict[str, int]
    message: str
    machine: Machine = Machine("cuda:0,cpu", 3, 1, 1e-3, 2)


QUIET: dict[str, int] = {}
WRONG = "wrong, missing|NonFinite|Overflow"  # bytes, or findings of bytes that were never written
REMOVE = "                        self._temp.remove()"
PLANTED = {
    "an error is swallowed": Planted(
        "engine.run", "self.error = e", "pass", {"write": 40}, "RuntimeError.*were never done"
    ),
    "another error is raised": Planted(
        "engine.run", "raise work.error", "raise RuntimeError('oops')", {"write": 40}, "RuntimeError.*oops.* after"
    ),
    "threads are not joined": Planted(
        "engine.run",
        "thread.join()",
        "return",
        {"cancelled": 3},
        "threads that were not joined",
        Machine("reference", delay=0.1),  # the thread is in a kernel when nobody waits for it
    ),
    "a slot ends without a word": Planted("engine.run", "self.n_serving -= 1", "pass", QUIET, "no end after"),
    "a second pass is never handed out": Planted(
        "engine.loads", "self._n_deferred -= 1", "pass", QUIET, "no end after"
    ),
    "a piece is dropped": Planted(
        "engine.loads", "file.popleft()\n", "(file.popleft(), file and file.popleft())\n", QUIET, "never done"
    ),
    "a kernel does not wait for its copy": Planted(
        "engine.streamed", 'streams.after("kernel", copied[1])', "pass", QUIET, WRONG
    ),
    "a copy does not wait for its kernel": Planted(
        "engine.streamed", 'streams.after("d2h", computed[1])', "pass", QUIET, WRONG
    ),
    "a slot does not wait for its results": Planted(
        "engine.streamed", 'self._streams.wait(marks["d2h"][1])', "pass", QUIET, WRONG
    ),
    "streams are not closed": Planted(
        "engine.streamed", "self._streams.close()", "pass", {"h2d": 3}, "threads that were not joined"
    ),
    "a ring is not halved": Planted(
        "engine.streamed",
        "return e.with_traceback(None)",
        "raise",
        {"allocate": 1},
        "smaller slots were not tried",
    ),
    "a ring is halved in silence": Planted(
        "engine.streamed", "self.notes += (note,)", "pass", {"allocate": 1}, "a note was expected"
    ),
    "a reader keeps its files open": Planted(
        "engine.readers", "os.close(self._descriptors.popitem()[1])", "self._descriptors.clear()", QUIET, "held before"
    ),
    "a short read is taken for a whole one": Planted(
        "engine.readers", "while have < need:", "while have == 0:", QUIET, WRONG
    ),
    "the rest of a short write is lost": Planted(
        "formats.open_files", "while data:\n        n = os.pw", "if data:\n        n = os.pw", QUIET, WRONG
    ),
    "a cause is not chained": Planted(
        "formats.output", 'there.") from e', 'there.") from None', {"write": 40}, "without its cause"
    ),
    "an aborted output stays": Planted(
        "formats.output", REMOVE, "pass".rjust(28), {"write": 1}, "nothing to go on with"
    ),
    "an aborted output gets its name": Planted(
        "formats.output", REMOVE, REMOVE.replace("remove()", "path.rename(self.target)"), {"write": 20}, WRONG
    ),
    "an output stays locked": Planted(
        "formats.output", "self._release()\n        return kept", "return kept", {"write": 1}, "held before"
    ),
    "a manifest outlives its output": Planted(
        "formats.output", "(parent / name).unlink(missing_ok=True)", "pass", {"rename": 1}, "out.manifest.parquet after"
    ),
    "NaN is kept for a resume": Planted(
        "pipeline.quantize", "not isinstance(e, InputError)", "True", {"nan": 0}, "kept, which would only come again"
    ),
    "what is kept is not spoken of": Planted(
        "pipeline.quantize", "e.add_note(", "str(", {"write": 60}, "and the error says"
    ),
    "a tensor is finished too early": Planted(
        "engine.run", "tensor.n_left == 0", "tensor.n_left == len(tensor.pieces) - 1", {"write": 60}, WRONG
    ),
    "Ctrl-C is not heard": Planted(
        "engine.run",
        "        while work.is_under_way",
        "        with contextlib.suppress(KeyboardInterrupt):\n          while work.is_under_way",
        {"interrupt": 150},
        "never done|did not matter",
    ),
}


def plant(patch: pytest.MonkeyPatch, fault: Planted) -> None:
    """Put the faulty functions and classes wherever the package, or these tests, use the real ones."""
    name = f"arrowquant_gpu.{fault.module}"
    live, edited = sys.modules[name], types.ModuleType(name)
    assert live.__file__ is not None
    text = Path(live.__file__).read_text()
    assert text.count(fault.old) >= 1, f"{name} has no {fault.old!r}"
    vars(edited).update(__file__=live.__file__, __package__=live.__package__)
    patch.setitem(sys.modules, name, edited)  # a dataclass looks its module up
    exec(compile(text.replace(fault.old, fault.new), live.__file__, "exec"), vars(edited))
    own = {id(v): vars(edited)[k] for k, v in vars(live).items() if getattr(v, "__module__", None) == name}
    users = [
        m
        for n, m in sys.modules.items()
        if n.startswith(("arrowquant_gpu", "tests.faults", "tests.simul")) and m is not edited
    ]
    own[id(live)] = edited
    for module in [live, *users]:
        for key, value in list(vars(module).items()):
            if id(value) in own:
                patch.setattr(module, key, own[id(value)])


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, models: Models, tmp_path: Path, held: Held) -> None:
    fault = PLANTED[name]
    for i in range(4):  # they are not to be made with the fault
        models.of(i)

    def run_with_it() -> None:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, fault)
            for i in range(12):
                run_case(Case(i, fault.machine, [fault.planned]), models.of(i % 4), tmp_path / str(i), held, 2.0)

    try:
        with pytest.raises((Exception, Hang), match=fault.message):
            run_with_it()
    finally:
        for streams in list(MADE):
            streams.close()
        for thread in threading.enumerate():
            if thread.name.startswith("arrowquant-"):
                thread.join(5)
