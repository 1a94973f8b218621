"""The property-based suite, `make fuzz`: how many cases were tried, and that none escaped."""

import cases
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz", deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("fuzz")


def pytest_terminal_summary(terminalreporter):
    escaped = len(terminalreporter.stats.get("failed", ()))
    terminalreporter.write_line(f"fuzz: {sum(cases.TRIED.values())} cases, {escaped} tests with a case that escaped")
    for name, number in sorted(cases.TRIED.items()):
        terminalreporter.write_line(f"  {number:7d} {name}")
