"""What a person is shown, written down."""

from hpo.runner.progress import Progress


class Screen(Progress):
    """Writes down what a person would be shown; `during` is called after each epoch."""

    def __init__(self, during=lambda number, epoch: None):
        self.started, self.epochs, self.ended, self._during = [], [], [], during
        self.paused, self.seconds = [], {}

    def trial_started(self, number, params):
        self.started.append((number, dict(params)))

    def epoch_ended(self, number, epoch, epochs, metrics):
        self.epochs.append((number, epoch, epochs))
        self._during(number, epoch)

    def trial_paused(self, number, epoch):
        self.paused.append((number, epoch))

    def trial_ended(self, number, state, value, reason, seconds=None):
        self.ended.append((number, state, value, reason))
        self.seconds[number] = seconds
