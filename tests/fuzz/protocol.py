"""A model of the protocol of ``store.epochs``: a gc, a run and ``verify --clean``, call by call.

Each process is a generator that yields its calls and is sent what they gave. ``explore`` makes
every call in every order from every state that can be reached, each state once, and so tries all
orders, kills at any call included: what holds in every state holds wherever a process dies.

A state is the files of the store, and of each process its position and its local variables. Hence
two rules for the processes: no ``for`` loop holds a call (its iterator would be a part of the state
that no variable shows), and a variable that is not needed any more is deleted (two states that
differ in it alone would both be tried).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Value = Any
"""Hashable content of a file."""
Files = dict[str, Value]
Call = tuple[Any, ...]
"""The kind of a call, a name, and the value that is written."""
Body = Generator[Call, Any, Any]
Epoch = tuple[int, frozenset[tuple[str, int]], frozenset[str]]
"""Number, generations of the shards that keep theirs, names of condemned runs."""

TRIES = 2
"""Most tries of a collection beside another one."""


class Wrong(AssertionError):
    """A state of the model breaks what the protocol promises."""


class GivenUp(Exception):
    """A process found that another one had given its work up, as it may."""


@dataclass(frozen=True)
class Protocol:
    """The steps of the protocol; a model without one of them must be found wrong."""

    claim_first: bool = True
    """A run claims before it reads the epoch."""
    look_again: bool = True
    """A gc lists the runs once more after it has published its epoch."""
    generations: bool = True
    """A commit is named by its generation."""
    condemn: bool = True
    """A run that was given up is marked so that it cannot be completed."""
    leases: bool = True
    """A lease spares its run."""
    plans: bool = True
    """``verify --clean`` leaves files of shards that a run under way plans."""
    old: frozenset[str] | None = None
    """Files that are older than the minimum age; None: there is no minimum age."""

    def is_old(self, names: Iterable[str]) -> bool:
        return self.old is None or set(names) <= self.old

    def commit(self, shard: str, generation: int) -> str:
        return f"shards/{shard}/commit-{generation if self.generations else 0}"


# --- names


def below(names: Iterable[str], folder: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if name.startswith(f"{folder}/")))


def folders(names: Iterable[str]) -> tuple[str, ...]:
    """The folders of ``names``, such as the runs of a listing of ``runs``."""
    return tuple(sorted({name.split("/")[1] for name in names}))


def commits_in(names: Iterable[str], shard: str) -> tuple[str, ...]:
    return tuple(name for name in below(names, f"shards/{shard}") if "/commit-" in name)


def generation_of(commit: str) -> int:
    return int(commit.rpartition("-")[2])


def generation_in(epoch: Epoch, shard: str) -> int:
    return dict(epoch[1]).get(shard, epoch[0])


# --- what processes share


def newest_epoch() -> Body:
    tries = 0
    while tries < 4:
        names = yield "list", "gc"
        if not names:
            return (0, frozenset(), frozenset())
        epoch = yield "read", names[-1]
        if epoch is not None:
            return epoch
        tries += 1
    raise GivenUp("the epochs change too fast")


def planned(run: str) -> Body:
    """The shards in the plan of ``run``."""
    plan = yield "read", f"runs/{run}/plan"
    if plan is not None:
        return plan
    state = yield "read", f"runs/{run}/run"
    if state is not None and state[0] == "complete":
        raise Wrong(f"run {run} is complete and has no plan")
    return ()


# --- a run


def run(protocol: Protocol, shards: tuple[str, ...], clock: str = "5", attempt: str = "x") -> Body:
    """Measure ``shards``; returns the name of the run."""
    epoch = None if protocol.claim_first else (yield from newest_epoch())
    newest, found = yield from _newest_begun(shards)
    if found:
        return (yield from go_on(protocol, shards, newest, attempt))
    name = yield from _begin(shards, max(clock, f"{newest}1"))
    return (yield from _work(protocol, shards, name, attempt, epoch=epoch))


def go_on(protocol: Protocol, shards: tuple[str, ...], name: str, attempt: str = "x") -> Body:
    """Take up the run ``name``, which was found to be the newest one, and of ``shards``."""
    lease = f"runs/{name}/lease-{attempt}"
    yield "once", lease, ()
    return (yield from _work(protocol, shards, name, attempt, lease=lease))


def _work(
    protocol: Protocol,
    shards: tuple[str, ...],
    name: str,
    attempt: str,
    *,
    lease: str | None = None,
    epoch: Epoch | None = None,
) -> Body:
    """Read the newest epoch behind the claim of the run ``name``, and complete the run."""
    if epoch is None:
        epoch = yield from newest_epoch()
    while name in epoch[2]:
        name, lease = (yield from _begin(shards, max("5", f"{max(name, *epoch[2])}1"))), None
        epoch = yield from newest_epoch()
    generations = tuple(generation_in(epoch, shard) for shard in shards)
    del epoch
    yield from complete(protocol, name, shards, generations, attempt)
    if lease is not None:
        yield "delete", lease
    return name


def _newest_begun(shards: tuple[str, ...]) -> Body:
    """The newest run that has a plan, and whether it is one of ``shards`` that can go on."""
    names = yield "list", "runs"
    left = folders(names)
    del names
    while left:
        name, left = left[-1], left[:-1]
        plan = yield "read", f"runs/{name}/plan"
        if plan is None:
            continue
        if plan != shards:
            return name, False
        state = yield "read", f"runs/{name}/run"
        return name, state is None or state[0] == "complete"
    return "", False


def _begin(shards: tuple[str, ...], name: str) -> Body:
    yield "once", f"runs/{name}/plan", shards
    return name


def complete(
    protocol: Protocol,
    name: str,
    shards: tuple[str, ...],
    generations: tuple[int, ...],
    attempt: str,
) -> Body:
    """Measure what has no commit, reduce, and end the run ``name``."""
    state = yield "read", f"runs/{name}/run"
    if state is not None and state[0] == "complete":
        return
    del state
    files: tuple[str, ...] = ()
    while len(files) < len(shards):
        commit = protocol.commit(shards[len(files)], generations[len(files)])
        file = yield "read", commit
        if file is None:
            file = yield from _publish(commit, f"{commit.rpartition('/')[0]}/{attempt}")
        files = (*files, file)
        del file, commit
    at = 0
    while at < len(files):  # the reduce
        if (yield "read", files[at]) is None:
            raise GivenUp(f"run {name} lacks {files[at]} before its end")
        at += 1
    del at
    if (yield "read", f"runs/{name}/plan") is None:
        raise GivenUp(f"run {name} has lost its plan")
    if not (yield "once", f"runs/{name}/run", ("complete", files)):
        state = yield "read", f"runs/{name}/run"
        if state != ("complete", files):
            raise GivenUp(f"run {name} was condemned")


def _publish(commit: str, file: str) -> Body:
    """Upload ``file`` and commit it; returns the file of the commit that won."""
    yield "over", file, "rows"
    if (yield "once", commit, file):
        return file
    winner = yield "read", commit
    if winner is None:
        raise Wrong(f"{commit} exists and cannot be read back")
    yield "delete", file
    return winner


# --- a garbage collection that keeps one run


def gc(protocol: Protocol) -> Body:
    tries = 0
    while tries < TRIES:
        found = yield from _look(protocol)
        if found is None:
            return
        epoch, gone, dead, files, known = found
        del found
        if (yield from _publish_epoch(epoch)):
            del tries
            break
        tries += 1
        del epoch, gone, dead, files, known
    else:
        raise GivenUp("other collections are at work")
    spared, covered = yield from _claimed(protocol, gone, dead, known)
    del known, epoch
    left = tuple(
        name
        for name in files
        if name.split("/")[1] not in (spared if name.startswith("runs/") else covered)
    )
    del files, gone, dead, spared, covered
    while left:
        yield "delete", left[0]
        left = left[1:]


def _look(protocol: Protocol) -> Body:
    """Deletes the next epoch, runs that are given up, dead ones, files, and what is known.

    What is known are the plans of the kept runs, and the leases that were seen. None: nothing.
    """
    before = yield from newest_epoch()
    runs = yield "list", "runs"
    shards = yield "list", "shards"
    dead: tuple[str, ...] = ()
    left = tuple(sorted(before[2] & set(folders(runs))))
    while left:
        if (yield "read", f"runs/{left[0]}/run") == ("condemned",):
            dead = (*dead, left[0])
        left = left[1:]
    plans = yield from _kept(protocol, runs, shards, dead)
    needed = {shard for _, theirs in plans for shard in theirs}
    generations = {shard: generation_in(before, shard) for shard in needed}
    doomed = []
    for shard in folders(shards):
        if shard in needed:
            continue
        if protocol.is_old(below(shards, f"shards/{shard}")):
            doomed.append(shard)
        elif (valid := protocol.commit(shard, generation_in(before, shard))) in shards:
            generations[shard] = generation_of(valid)
    del needed
    kept = dict(plans)
    doomed_runs = tuple(name for name in folders(runs) if name not in kept and name not in dead)
    of_runs = [name for run in (*doomed_runs, *dead) for name in below(runs, f"runs/{run}")]
    of_shards = [name for shard in doomed for name in below(shards, f"shards/{shard}")]
    commits_first = sorted(
        of_shards, key=lambda name: (*name.split("/")[:2], "/commit-" not in name)
    )
    files = (*(name for name in of_runs if not name.endswith("/run")), *commits_first)
    del of_runs, of_shards, commits_first
    generation_rows = frozenset(generations.items())
    leftovers = yield from _leftovers(shards, plans, tuple(sorted(generations.items())))
    if not files and not doomed_runs and not leftovers:
        return None
    condemned = frozenset({*doomed_runs, *(before[2] & set(folders(runs)))})
    epoch = (before[0] + 1, generation_rows, condemned)
    seen = frozenset(name for name in runs if "/lease-" in name or name.endswith("/run"))
    return epoch, doomed_runs, dead, (*files, *leftovers), (plans, seen)


def _kept(
    protocol: Protocol, runs: tuple[str, ...], shards: tuple[str, ...], dead: tuple[str, ...]
) -> Body:
    """The kept runs with their plans."""
    names = tuple(name for name in folders(runs) if name not in dead)
    complete = tuple(name for name in names if f"runs/{name}/run" in runs)
    newest = max(complete, default="")
    kept: tuple[tuple[str, tuple[str, ...]], ...] = ()
    while names:
        name, names = names[0], names[1:]
        mine = below(runs, f"runs/{name}")
        if name in complete:
            leases = [file for file in mine if "/lease-" in file]
            keep = name == newest or (protocol.leases and not protocol.is_old(leases))
            if keep:
                kept = (*kept, (name, (yield from planned(name))))
            continue
        plan = yield from planned(name)
        files = [*mine, *(file for shard in plan for file in below(shards, f"shards/{shard}"))]
        if name > newest or not protocol.is_old(files):
            kept = (*kept, (name, plan))
    return kept


def _leftovers(
    shards: tuple[str, ...],
    plans: tuple[tuple[str, tuple[str, ...]], ...],
    generations: tuple[tuple[str, int], ...],
) -> Body:
    """Commits of outdated generations, with their files, in shards that stay."""
    old = tuple(
        commit
        for shard, generation in generations
        for commit in commits_in(shards, shard)
        if generation_of(commit) < generation
    )
    named: frozenset[str] = frozenset()
    while old and plans:
        (name, theirs), plans = plans[0], plans[1:]
        mine = tuple(commit for commit in old if commit.split("/")[1] in theirs)
        if not mine:
            continue
        state = yield "read", f"runs/{name}/run"
        if state is not None and state[0] == "complete":
            named |= set(state[1])
        else:
            old = tuple(commit for commit in old if commit not in mine)
        del state
    found: tuple[str, ...] = ()
    while old:
        file = yield "read", old[0]
        if file is not None and file not in named:
            found = (*found, old[0], *({file} & set(shards)))
        old = old[1:]
    return found


def _publish_epoch(epoch: Epoch) -> Body:
    """True if ``epoch`` is the newest now."""
    name = f"gc/{epoch[0]}"
    if not (yield "once", name, epoch):
        return False
    names = yield "list", "gc"
    if names[-1] != name:
        return False
    old = names[:-1]
    del names
    while old:
        yield "delete", old[0]
        old = old[1:]
    return True


def _claimed(
    protocol: Protocol,
    doomed_runs: tuple[str, ...],
    dead: tuple[str, ...],
    known: tuple[tuple[tuple[str, tuple[str, ...]], ...], frozenset[str]],
) -> Body:
    """The runs that are spared, and the shards that spared and new runs plan."""
    if not protocol.look_again:
        return (), frozenset()
    plans, seen = known
    now = yield "list", "runs"
    spared: tuple[str, ...] = ()
    left = doomed_runs
    while left:
        name, left = left[0], left[1:]
        leases = {file for file in below(now, f"runs/{name}") if "/lease-" in file}
        if protocol.leases and leases - seen:
            spared = (*spared, name)
            continue
        given_up = yield from _condemn(protocol, name, was_complete=f"runs/{name}/run" in seen)
        if not given_up:
            spared = (*spared, name)
    gone = {*doomed_runs, *dead} - {*spared}
    planned_before = dict(plans)
    left = tuple(name for name in folders(now) if name not in gone and not planned_before.get(name))
    del now, gone, planned_before, plans, seen, known
    covered: frozenset[str] = frozenset()
    while left:
        covered |= set((yield from planned(left[0])))
        left = left[1:]
    return spared, covered


def _condemn(protocol: Protocol, name: str, *, was_complete: bool) -> Body:
    """True if the run ``name`` cannot be completed any more."""
    if not protocol.condemn:
        return True
    if was_complete:
        yield "over", f"runs/{name}/run", ("condemned",)
        return True
    if (yield "once", f"runs/{name}/run", ("condemned",)):
        return True
    return (yield "read", f"runs/{name}/run") == ("condemned",)


# --- verify --clean


def clean(protocol: Protocol) -> Body:
    """Remove files that no commit names and no attempt can name."""
    files = yield "list", "shards"
    epoch = yield from newest_epoch()
    left = folders(files)
    loose: tuple[str, ...] = ()
    committed: frozenset[str] = frozenset()
    while left:
        shard, left = left[0], left[1:]
        named, generations = yield from _commits_of(shard)
        loose += tuple(
            name
            for name in below(files, f"shards/{shard}")
            if "/commit-" not in name and name not in named
        )
        if generation_in(epoch, shard) in generations:
            committed |= {shard}
    del files, named, generations, left
    if not loose:
        return
    plans = yield from _add_new_plans(((), frozenset(), frozenset(), False))
    loose = tuple(
        name for name in loose if _may_remove(protocol, name.split("/")[1], epoch, committed, plans)
    )
    del committed, epoch
    plans = yield from _add_new_plans(plans)
    epoch = yield from newest_epoch()
    while loose:
        shard = loose[0].split("/")[1]
        named, generations = yield from _commits_of(shard)
        valid = frozenset({shard} if generation_in(epoch, shard) in generations else ())
        del generations
        mine = tuple(name for name in loose if name.split("/")[1] == shard)
        loose = tuple(name for name in loose if name not in mine)
        if not _may_remove(protocol, shard, epoch, valid, plans):
            mine = ()
        mine = tuple(name for name in mine if name not in named)
        del named, valid, shard
        while mine:
            yield "delete", mine[0]
            mine = mine[1:]


def _commits_of(shard: str) -> Body:
    """The files that the commits of ``shard`` name, and their generations."""
    names = yield "list", f"shards/{shard}"
    left = commits_in(names, shard)
    del names
    named: frozenset[str] = frozenset()
    generations: frozenset[int] = frozenset()
    while left:
        file = yield "read", left[0]
        if file is not None:
            named |= {file}
            generations |= {generation_of(left[0])}
        left = left[1:]
    return named, generations


def _add_new_plans(
    plans: tuple[tuple[str, ...], frozenset[str], frozenset[str], bool],
) -> Body:
    """Names of runs that were read, shards that runs under way plan, that any plans, and whether a
    plan could not be read.
    """
    read, under_way, every, unreadable = plans
    names = yield "list", "runs"
    left = tuple(name for name in folders(names) if name not in read)
    del names, plans
    while left:
        name, left = left[0], left[1:]
        if (yield "read", f"runs/{name}/plan") is None:
            continue
        state = yield "read", f"runs/{name}/run"
        plan = yield "read", f"runs/{name}/plan"
        if plan is None:
            unreadable = True
            continue
        read = (*read, name)
        every |= set(plan)
        if state is None or state[0] != "complete":
            under_way |= set(plan)
        del state, plan
    return read, under_way, every, unreadable


def _may_remove(
    protocol: Protocol,
    shard: str,
    epoch: Epoch,
    committed: frozenset[str],
    plans: tuple[tuple[str, ...], frozenset[str], frozenset[str], bool],
) -> bool:
    if not protocol.plans:
        return True
    generation = generation_in(epoch, shard)
    _, under_way, every, unreadable = plans
    if shard in committed and generation == 0:
        return True
    if unreadable or shard in under_way:
        return False
    return shard in committed or not (generation and shard in every)


# --- all orders


@dataclass(frozen=True)
class State:
    """The files, DELETEs that may act once more, and what each process was given so far."""

    files: frozenset[tuple[str, Value]]
    echoes: frozenset[str]
    given: tuple[tuple[Any, ...], ...]


def answer(files: Files, call: Call) -> Any:
    """Make ``call``, which may change ``files``."""
    kind, name = call[:2]
    match kind:
        case "list":
            return below(files, name)
        case "read":
            return files.get(name)
        case "once":
            if name in files:
                return False
            files[name] = call[2]
            return True
        case "over":
            files[name] = call[2]
        case "delete":
            files.pop(name, None)
        case _:
            raise ValueError(f"{kind} is no call")
    return None


@dataclass(frozen=True)
class Live:
    """A process that was given some answers: its next call, or how it ended."""

    call: Call | None
    result: Any
    error: Exception | None
    place: Any
    """Position and local variables of the process and of the generators that it waits for."""


def live(body: Body, given: tuple[Any, ...]) -> Live:
    """The process ``body`` after the answers ``given``."""
    call = None
    try:
        call = body.send(None)
        for value in given:
            call = body.send(value)
    except StopIteration as end:
        return Live(None, end.value, None, ("ended", end.value))
    except (GivenUp, Wrong) as error:
        return Live(None, None, error, ("failed", type(error)))
    place = []
    inner: Any = body
    while inner is not None:
        variables = sorted((k, _hashable(v)) for k, v in inner.gi_frame.f_locals.items())
        place.append((inner.gi_frame.f_lasti, tuple(variables)))
        inner = inner.gi_yieldfrom
    return Live(call, None, None, tuple(place))


def _hashable(value: Any) -> Any:
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def explore(
    files: Files,
    bodies: tuple[Callable[[], Body], ...],
    check: Callable[[Files, list[Live]], None],
    *,
    echo: bool = False,
) -> tuple[int, set[frozenset[tuple[str, Value]]]]:
    """Call ``check`` with each state that can be reached.

    Returns the number of states, and what the store holds where all processes have ended.
    ``echo``: each DELETE of a file of a shard may act once more at any later time. Raises what
    ``check`` raises, with the calls that led there.
    """
    seen: set[Any] = set()
    ends: set[frozenset[tuple[str, Value]]] = set()
    process = functools.cache(lambda i, given: live(bodies[i](), given))
    start = State(frozenset(files.items()), frozenset(), ((),) * len(bodies))
    stack: list[tuple[State, Any]] = [(start, None)]
    while stack:
        state, path = stack.pop()
        processes = [process(i, given) for i, given in enumerate(state.given)]
        key = state.files, state.echoes, tuple(p.place for p in processes)
        if key in seen:
            continue
        seen.add(key)
        now = dict(state.files)
        try:
            check(now, processes)
        except Wrong as error:
            error.add_note("\n".join(_calls_of(path)))
            raise
        if all(p.call is None for p in processes):
            ends.add(state.files)
        for who, call, after in _steps(state, now, processes, echo=echo):
            stack.append((after, (path, who, call)))
    return len(seen), ends


def _steps(
    state: State, now: Files, processes: list[Live], *, echo: bool
) -> Iterator[tuple[int | str, Call, State]]:
    """Calls that each process can make now, and the state behind it."""
    for i, process in enumerate(processes):
        if process.call is None:
            continue
        kind, name = process.call[:2]
        after, echoes = dict(now), state.echoes
        value = answer(after, process.call)
        if echo and kind == "delete" and name.startswith("shards/"):
            echoes |= {name}
        given = (*state.given[:i], (*state.given[i], value), *state.given[i + 1 :])
        yield i, process.call, State(frozenset(after.items()), echoes, given)
    for name in state.echoes & now.keys():
        left = frozenset((k, v) for k, v in now.items() if k != name)
        yield "echo", ("delete", name), State(left, state.echoes, state.given)


def _calls_of(path: Any) -> Iterator[str]:
    found = []
    while path is not None:
        path, who, call = path
        found.append(f"{who}: {' '.join(map(str, call))}")
    return reversed(found)


def alone(files: Files, body: Body) -> Any:
    """Run one process to its end on ``files``; returns its result."""
    value = None
    try:
        while True:
            value = answer(files, body.send(value))
    except StopIteration as end:
        return end.value
