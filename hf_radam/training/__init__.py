"""The parts that `RAdamTrainerMixin` is made of."""
