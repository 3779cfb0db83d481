from .build import (
    build_report as build_report,
    check_out as check_out,
    write_report as write_report,
)
from .figures import (
    DEFAULT_MAX_SAMPLES as DEFAULT_MAX_SAMPLES,
    CacheReport as CacheReport,
    DatasetSplits as DatasetSplits,
    collect_report as collect_report,
)
