"""Groups of a split whose images are not on the disk: the annotations' own sizes count."""

from collections.abc import Iterator
from pathlib import Path

from amltrain.data.images import ImageFile
from amltrain.data.sources.annotations import Annotations, ImageGroup, image_jobs, job_group, read_job


def image_groups(files: Annotations, split: str) -> Iterator[ImageGroup]:
    """What `prepare` makes of a split's annotations."""
    for job in image_jobs(files, split):
        if job.image is None:
            yield read_job(job, Path(), files.categories)
        else:
            yield job_group(job, ImageFile(b"", job.image["height"], job.image["width"]), files.categories)
