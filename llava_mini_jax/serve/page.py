"""The page: one static file that loads nothing from elsewhere, and headers that keep it so."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path


def page() -> tuple[str, dict[str, str]]:
  """HTML, and headers; only the script and style that it holds itself may run."""
  html = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
  allowed = {tag: ' '.join(f"'sha256-{_digest(text)}'" for text in _inside(tag, html)) for tag in ('script', 'style')}
  policy = [
    "default-src 'none'",
    f'script-src {allowed["script"]}',
    f'style-src {allowed["style"]}',
    'img-src blob:',
    'media-src blob:',
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ]
  headers = {
    'content-security-policy': '; '.join(policy),
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
    'cache-control': 'no-cache',
  }
  return html, headers


def _inside(tag: str, html: str) -> list[str]:
  return re.findall(f'<{tag}>(.*?)</{tag}>', html, re.DOTALL)


def _digest(text: str) -> str:
  return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
