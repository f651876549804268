"""Every case, by category. A new finding becomes a row here first."""

from tests.attack import (
    files_with_code,
    model_folders,
    numbers_and_texts,
    own_files,
    pictures,
    prepared_data,
    refer_files,
)
from tests.attack.cases import Case

CASES: list[Case] = [
    *files_with_code.cases(),
    *model_folders.cases(),
    *pictures.cases(),
    *refer_files.cases(),
    *prepared_data.cases(),
    *own_files.cases(),
    *numbers_and_texts.cases(),
]
