"""Embeddings of other tools' files into a store, and out of it: import and export."""

from lmdbcache.transfer.exporting import ExportReport, export_embeddings
from lmdbcache.transfer.importing import import_embeddings
from lmdbcache.transfer.report import ImportReport

__all__ = ["ExportReport", "ImportReport", "export_embeddings", "import_embeddings"]
