"""The two optimizers: RAdam, and RAdam with schedule-free averaging."""

from hf_radam.optim.radam import RAdam
from hf_radam.optim.schedule_free import RAdamScheduleFree, schedule_free_x, x_shard, x_shards

__all__ = ["RAdam", "RAdamScheduleFree", "schedule_free_x", "x_shard", "x_shards"]
