from .build import build_report as build_report, collect_report as collect_report
