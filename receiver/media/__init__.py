"""Files: which may be fetched, how they are fetched whole, and where they are kept."""

from receiver.core.output_files import Kind
from receiver.media.download import Downloader, Limits, StoredFile
from receiver.media.hosts import MediaHosts
from receiver.media.pools import open_tls
from receiver.media.storage import Storage, open_storage

__all__ = ["Downloader", "Kind", "Limits", "MediaHosts", "Storage", "StoredFile", "open_storage", "open_tls"]
