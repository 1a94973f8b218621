"""How the commands show their arguments."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, shows the defaults that say something, and each option under one name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser adds every option a second time, with hyphens.
        if len(action.option_strings) < 2 or not action.option_strings[0].startswith("--"):
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}".rstrip()
