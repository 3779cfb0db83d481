"""LMDB's pages, read without LMDB."""
