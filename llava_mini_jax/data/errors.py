"""The one error that bad data raises: a stable code, the thing it names, what was expected and found."""

from __future__ import annotations


class DataError(ValueError):
  """Bad input data.

  Attributes:
    code: stable and machine-readable, e.g. `E_IMG_FORMAT`, `E_IMAGE_TAGS`, `E_JSON`, `E_PATH`.
    where: file, line, record or sample id, and field, as far as they are known.
  """

  def __init__(self, code: str, where: str, message: str):
    super().__init__(f'{code}: {where}: {message}')
    self.code = code
    self.where = where
    self.message = message

  def at(self, place: str) -> DataError:
    """The same error, led by where the thing itself lies; '' = as it is."""
    return DataError(self.code, f'{place}: {self.where}', self.message) if place else self

  def __reduce__(self):  # worker processes hand exceptions back by pickling their arguments
    return type(self), (self.code, self.where, self.message)
