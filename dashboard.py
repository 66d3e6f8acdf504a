"""
Save a wandb workspace for your project: validation loss against steps, tokens and hours, and what
to watch during training. Runs are grouped by optimizer, and each has its own colour.

    python dashboard.py --project=sophia-gpt2

Needs an account (wandb login) and the package wandb-workspaces. Every call saves a new workspace.
"""
from configurator import TrainConfig
from script import ArgumentParser, UserError, run_script

# Section: {metric: what the panel's title says of it}. Names of metrics.py.
PANELS = {
    "Training loss": {
        "train/loss": "mean over ranks and micro-batches of one step",
        "train/loss_max": "largest on any rank since the last log line",
        "train/skipped": "updates skipped because a gradient was not finite"},
    "SophiaG": {
        "train/win_rate": "share of coordinates not clipped; healthy: 0.1 to 0.5",
        "train/rho": "raise it where win_rate is below 0.1, lower it above 0.5"},
    "Optimizer": {
        "lr": "learning rate",
        "grad_norm": "before clipping",
        "train/clip_rate": "share of steps with a clipped gradient",
        "param_norm": "of the weights",
        "momentum_norm": "of the EMA of gradients",
        "hessian_norm": "of the EMA of Hessian estimates"},
    "Speed": {
        "tokens_per_sec": "of training steps, without evaluation",
        "mfu": "model FLOPs utilization"}}


def build(entity, project):
    """The workspace, not saved yet. Raises UserError."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces.expr import Config
    except ImportError:
        raise UserError("dashboard.py needs: pip install wandb wandb-workspaces") from None

    class Workspace(ws.Workspace):
        def _to_model(self):
            # A line for each run, not a mean for each group: the public interface lacks this.
            view = super()._to_model()
            section = view.spec.section
            for settings in (section.settings, *(s.local_panel_settings for s in
                                                 section.panel_bank_config.sections)):
                settings.use_runs_table_grouping_in_panels = False
            return view

    def panel(metric, meaning, x="iter"):
        share = metric in ("train/win_rate", "train/clip_rate", "mfu")
        return panels.LinePlot(title=f"{metric}: {meaning}", x=x, y=[metric],
                               range_y=(0, 1) if share else (None, None))

    loss = [panel("val/loss", f"against {x}", x) for x in ("iter", "tokens", "hours")]
    sections = {"Validation loss": loss, **{
        name: [panel(*item) for item in metrics.items()] for name, metrics in PANELS.items()}}
    return Workspace(
        entity, project, "Optimizers side by side",
        sections=[ws.Section(name, plots, is_open=True) for name, plots in sections.items()],
        runset_settings=ws.RunsetSettings(groupby=[Config("optimizer")]))


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--project", default=TrainConfig.wandb_project, help="now %(default)s")
    parser.add_argument("--entity", help="user or team that owns it (default: yours)")
    args = parser.parse_args(argv)
    workspace = build(args.entity or "", args.project)
    import wandb  # only now: importing it takes a second
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    try:
        workspace.entity = args.entity or wandb.Api().default_entity
        workspace.save()   # prints its address
    except (wandb.Error, WandbApiFailedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"cannot save the workspace: {reason}; saving needs an account and a "
                        f"project with runs") from None


if __name__ == "__main__":
    run_script(main)
