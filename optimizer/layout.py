# ruff: noqa: N815 - capitals at the end of a name are the shape of its array
"""What each column means: a (student, place) pair, with a power mode or server units, and uplink.

Shapes: R columns before any is dropped. Device: M students x K modes x B unit counts; twin: M x S
server choices x B + 1 unit counts, the first of them 0; sitting out: 1.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from optimizer.plan import Place
from optimizer.problem import Problem

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Booleans: TypeAlias = npt.NDArray[np.bool_]

BIG = 1e9
"""The cost of a column that may not be chosen: above every real one, and still a number."""

OUT = -1
"""The student and mode of a column that names none."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What column r of R means, the same for every row; `pair_R` numbers (student, place).

    Pairs: M students on the device, the same at the twin, sitting out (2M).
    """

    student_R: Integers
    mode_R: Integers
    uplink_R: Integers
    server_R: Integers
    pair_R: Integers
    uplink_levels: Integers
    server_levels: Integers
    device: tuple[int, int, int]
    twin: tuple[int, int, int]

    def place_of(self, raw: int) -> Place:
        """Where a column trains."""
        if self.student_R[raw] == OUT:
            return "out"
        return "twin" if self.mode_R[raw] == OUT else "device"

    @property
    def pairs(self) -> int:
        """How many (student, place) pairs there are, sitting out being the last."""
        return 2 * self.device[0] + 1


def lay_out(problem: Problem) -> Layout:
    """The columns that a problem's offers make; a teacher beside the students uses the twin's."""
    students = len(problem.students)
    modes = max((len(user.modes) for user in problem.users), default=0)
    uplink = np.array(sorted(problem.uplink_choices), np.int64)
    beside = problem.teacher is not None and not problem.teacher.is_sequential
    choices = set(problem.server.choices)
    if problem.teacher is not None and beside:
        choices |= set(problem.teacher.choices)
    server = np.array(sorted(choices), np.int64)
    # A teacher without any users still needs a row of columns to stand in.
    device = (max(1, students), modes, len(uplink))
    twin = (max(1, students), len(server), len(uplink) + 1)
    m_dev, k_dev, b_dev = (axis.ravel() for axis in np.indices(device))
    m_twin, s_twin, b_twin = (axis.ravel() for axis in np.indices(twin))
    nothing = np.array([OUT])
    levels = np.concatenate([[0], uplink])
    return Layout(
        student_R=np.concatenate([m_dev, m_twin, nothing]),
        mode_R=np.concatenate([k_dev, np.full_like(m_twin, OUT), nothing]),
        uplink_R=np.concatenate([uplink[b_dev], levels[b_twin], [0]]),
        server_R=np.concatenate([np.zeros_like(m_dev), server[s_twin], [0]]),
        pair_R=np.concatenate([m_dev, device[0] + m_twin, [2 * device[0]]]),
        uplink_levels=levels,
        server_levels=np.concatenate([[0], server]).astype(np.int64),
        device=device,
        twin=twin,
    )
