"""Files of events: the allow-list of hosts, the download, and the storage."""

from receiver.media.download import Downloader, DownloadLimits, StoredFile
from receiver.media.hosts import MediaHosts
from receiver.media.pools import open_tls
from receiver.media.storage import Storage, local_folder, open_storage

__all__ = [
    "DownloadLimits",
    "Downloader",
    "MediaHosts",
    "Storage",
    "StoredFile",
    "local_folder",
    "open_storage",
    "open_tls",
]
