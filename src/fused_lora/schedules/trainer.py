"""A merge schedule in transformers' Trainer."""

from pathlib import Path

from transformers import TrainerCallback

from fused_lora.schedules.merge_schedule import MergeSchedule

NAME = "merge_schedule.safetensors"


class MergeCallback(TrainerCallback):
    """Steps a schedule after each step of Trainer's, writes its state beside Trainer's checkpoints and reads it when
    the training resumes. With `ranks` Trainer reads A and B before that, which have another rank after a knot: there
    `schedule.load(<checkpoint>/merge_schedule.safetensors)` comes before `train`."""

    def __init__(self, schedule: MergeSchedule):
        self.schedule = schedule

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Raises: ValueError if the training resumes without the state of the schedule, or is to end with its best
        checkpoint: Trainer would put back A and B alone, over base weights that have changed since."""
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end must be False with a merge schedule; got True")
        if state.global_step != self.schedule.steps:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", NAME)
            if not path.exists():
                raise ValueError(
                    f"the merge schedule must be at step {state.global_step} as Trainer is; got {self.schedule.steps}, "
                    f"and no {path}: schedule.load(<checkpoint>/{NAME!r}) before train()"
                )
            self.schedule.load(path)
        self.schedule.attach(optimizer)

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.schedule.step(optimizer, lr_scheduler)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.schedule.save(Path(args.output_dir, f"checkpoint-{state.global_step}", NAME))
