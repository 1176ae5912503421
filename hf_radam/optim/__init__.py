"""The two optimizers: RAdam, and RAdam with schedule-free averaging."""

from hf_radam.optim.iterate_x import schedule_free_x, x_piece, x_pieces
from hf_radam.optim.radam import RAdam
from hf_radam.optim.schedule_free import RAdamScheduleFree

__all__ = ["RAdam", "RAdamScheduleFree", "schedule_free_x", "x_piece", "x_pieces"]
