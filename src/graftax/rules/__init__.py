"""The rules file: it states what the user knows and inference cannot find.

    rules = load_rules("R.toml")                          # or TOML text, or a list of tables
    outcome = apply_rules(rules, source, like, "torch", "flax")

A rule is a two-way key template with a layout. Everything here is data: nothing is executed, and no regular expression
comes from the user.
"""

from graftax.rules.apply import RuleOutcome, apply_rules
from graftax.rules.load import Rules, load_rules
from graftax.rules.model import Rule
from graftax.rules.template import escape_key
from graftax.rules.text import rule_line

__all__ = ["Rule", "RuleOutcome", "Rules", "apply_rules", "escape_key", "load_rules", "rule_line"]
