"""The HTML report: one file that shows what a cache holds, to read and to hand on."""

from lmdbcache.report.build import build_report, collect_report

__all__ = ["build_report", "collect_report"]
