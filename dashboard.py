"""
Save a wandb workspace that charts validation loss and all metrics, with runs grouped by optimizer.

    python dashboard.py --project=sophia-gpt2

Needs an account (wandb login) and the package wandb-workspaces. Each call saves a new workspace.
"""
from configurator import TrainConfig
from script import ArgumentParser, UserError, run_script

# {section: {metric name in metrics.py: meaning, for the panel's title}}
PANELS = {
    "Training loss": {
        "train/loss": "mean over ranks and micro-batches of one step",
        "train/loss_max": "largest of any rank since the last log line",
        "train/skipped": "updates skipped because of a non-finite gradient"},
    "SophiaG": {
        "train/win_rate": "share of coordinates not clipped; healthy: 0.1 to 0.5",
        "train/rho": "raise it if win_rate is below 0.1, lower it above 0.5"},
    "Optimizer": {
        "lr": "learning rate", "grad_norm": "before clipping", "param_norm": "of the weights",
        "train/clip_rate": "share of steps with a clipped gradient",
        "momentum_norm": "of the gradient EMA", "hessian_norm": "of the Hessian EMA"},
    "Speed": {"tokens_per_sec": "without evaluation", "mfu": "model FLOPs utilization"}}


def build_workspace(entity, project):
    """The workspace, not yet saved. Raises UserError if the package is missing."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces.expr import Config
    except ImportError:
        raise UserError("dashboard.py needs: pip install wandb wandb-workspaces") from None

    class Workspace(ws.Workspace):
        def _to_model(self):
            # One line per run, not a mean per group; the public interface has no such option.
            view = super()._to_model()
            section = view.spec.section
            panel_sections = section.panel_bank_config.sections
            for settings in section.settings, *(s.local_panel_settings for s in panel_sections):
                settings.use_runs_table_grouping_in_panels = False
            return view

    def panel(metric, meaning, x="iter"):
        limits = (0, 1) if metric in ("train/win_rate", "train/clip_rate", "mfu") else (None, None)
        return panels.LinePlot(title=f"{metric}: {meaning}", x=x, y=[metric], range_y=limits)

    charts = {name: [panel(*item) for item in metrics.items()] for name, metrics in PANELS.items()}
    losses = [panel("val/loss", f"against {x}", x) for x in ("iter", "tokens", "hours")]
    sections = [ws.Section(name, plots, is_open=True)
                for name, plots in {"Validation loss": losses, **charts}.items()]
    return Workspace(entity, project, "Optimizers side by side", sections=sections,
                     runset_settings=ws.RunsetSettings(groupby=[Config("optimizer")]))


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--project", default=TrainConfig.wandb_project, help="default: %(default)s")
    parser.add_argument("--entity", help="user or team (default: your own)")
    args = parser.parse_args(argv)
    workspace = build_workspace(args.entity or "", args.project)
    import wandb  # here, since importing it takes a second
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    try:
        workspace.entity = args.entity or wandb.Api().default_entity
        workspace.save()   # prints its URL
    except (wandb.Error, WandbApiFailedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"cannot save the workspace: {reason}; the project must exist") from None


if __name__ == "__main__":
    run_script(main)
