"""A monkey that kills at random, by a seed, for as long as asked.

Rounds, one after the other, on a local disk and on S3 in turn. In a round one run is worked on by
two drivers at once, or by one driver and its Ray workers, while a monkey kills, stops and
terminates them and they are started anew; some kills hit between the upload and the commit. Then
one driver finishes in peace, and the store must be whole and have the rows of an undisturbed run.
Prints each round and, at the end, the faults by kind.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from drivers import Driver, Drivers
from ground import Ground
from hosts import Chaos

POINTS = ("process", "measured", "uploaded", "committed")
RAY_EVERY = 4
"""One of so many rounds is on Ray: it takes as long as the others together."""
FAULTS_IN_ROUND = 25


@dataclass
class Soak:
    """The monkey and what it did."""

    grounds: list[Ground]
    chaos: Chaos
    drivers: Drivers
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def run(self, seconds: float) -> None:
        """Rounds until ``seconds`` are over; each is finished and checked."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            dice = random.Random(f"{self.seed} {self.rounds}")
            ground = self.grounds[self.rounds % len(self.grounds)]
            on_ray = self.rounds % RAY_EVERY == RAY_EVERY - 1
            before = self.faults.total()
            self._round(ground, dice, on_ray, end)
            self.rounds += 1
            print(
                f"round {self.rounds} ({ground.kind}, {'Ray' if on_ray else 'two drivers'}): "
                f"{self.faults.total() - before} faults, every row once",
                flush=True,
            )

    def _round(self, ground: Ground, dice: random.Random, on_ray: bool, end: float) -> None:
        store = ground.store()
        changes = {"executor": "ray", "workers": "2"} if on_ray else {}
        arguments = ground.arguments(store, **changes)
        planned = [
            {"point": dice.choice(POINTS), "skip": dice.randrange(40), "do": "sigkill"}
            for _ in range(FAULTS_IN_ROUND)
        ]
        self.chaos.plan(*planned, slow_s=1.5 if on_ray else 0.15)
        with contextlib.ExitStack() as stack:
            running = [
                stack.enter_context(self.drivers.start(*arguments))
                for _ in range(1 if on_ray else 2)
            ]
            struck = 0
            while struck < FAULTS_IN_ROUND and time.monotonic() < end + 30:
                time.sleep(dice.uniform(0.1, 1.2))
                for at, driver in enumerate(running):
                    if driver.is_alive:
                        continue
                    code, said = driver.finish()
                    # 1: a shard was hit twice while it was alone
                    assert code in (0, 1, 75, -signal.SIGKILL, -signal.SIGTERM), (code, said)
                    if code == 0:
                        break  # complete: to strike it further proves nothing
                    running[at] = stack.enter_context(self.drivers.start(*arguments))
                else:
                    struck += self._strike(dice, running, on_ray)
                    continue
                break
            for driver in running:
                driver.kill_all()
        self.faults["kill at a point"] += sum(
            "fault" in e for point in POINTS for e in self.chaos.events(point)
        )
        self.chaos.plan()
        with self.drivers.start(*ground.arguments(store)) as driver:
            code, said = driver.finish()
            assert code == 0, said
        ground.check(store)

    def _strike(self, dice: random.Random, running: list[Driver], on_ray: bool) -> int:
        driver = dice.choice(running)
        kind = dice.choice(["SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM"])
        if on_ray and dice.random() < 0.8:
            return self._strike_worker(dice, kind)
        if kind == "SIGKILL" and on_ray:
            driver.kill_all()
        else:
            driver.signal(signal.Signals[kind])
        if kind == "SIGSTOP":
            time.sleep(dice.uniform(0.2, 2))
            driver.signal(signal.SIGCONT)
        self.faults[f"{kind} to a driver"] += 1
        return 1

    def _strike_worker(self, dice: random.Random, kind: str) -> int:
        """A process that has worked on a shard in the last seconds, if there is one."""
        late = time.time() - 5
        pids = sorted({e["pid"] for e in self.chaos.events("process") if e["time"] > late})
        if not pids:
            return 0
        pid = dice.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[kind])
            self.faults[f"{kind} to a worker"] += 1
            if kind == "SIGSTOP":
                time.sleep(dice.uniform(0.2, 2))
                os.kill(pid, signal.SIGCONT)
            return 1
        return 0
