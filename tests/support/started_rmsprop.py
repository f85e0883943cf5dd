"""SVAGRMSprop for tests that are not about its start: beyond ``l = 1`` it has one unless they say otherwise."""

from __future__ import annotations

from typing import Any

import svag_fast


class SVAGRMSprop(svag_fast.SVAGRMSprop):
    """With ``initial_square_avg=1.0`` at ``l > 1``, where the optimizer itself asks for one."""

    def __init__(self, *args: Any, l: float = 1, **options: Any) -> None:
        start = {} if l == 1 else {"initial_square_avg": 1.0}
        super().__init__(*args, l=l, **(start | options))
