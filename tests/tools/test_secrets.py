"""What `push` takes for a token or key, and what it does not: a list kept to judge other rules by.

detect-secrets 1.5.0 with its default rules misses 8 of the first and reports 7 of the second, hashes among them.
"""

from __future__ import annotations

import pytest

import kaggle_cli

# put together here, so that no scanner takes this file for a leak
HEX = "0123456789abcdef"
KAGGLE, WANDB = "9f" + HEX[:14] + HEX, "3c5e" + HEX[2:] + HEX[:6] + HEX
MIXED = "aB3dE5fG7hJ9kL2mN4pQ6rS8tU1vW3xY5zA7bC9dE"
AWS = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYzzzzzzzzKE"
PEM = "-----BEGIN {}PRIVATE KEY-----\nMIIEvQ"

SECRET = [
    f'KAGGLE_KEY = "{KAGGLE}"',
    f'os.environ["KAGGLE_KEY"] = "{KAGGLE}"',
    f'{{"username": "ann", "key": "{KAGGLE}"}}',
    f"export KAGGLE_KEY={KAGGLE}",
    f'api_key="{KAGGLE}"',
    "KGAT_" + HEX * 2,
    f'WANDB_API_KEY = "{WANDB}"',
    f"%env WANDB_API_KEY={WANDB}",
    f'os.environ["WANDB_API_KEY"] = "{WANDB}"',
    f"os.environ['WANDB_API_KEY'] = '{WANDB}'",
    f'wandb.login(key="{WANDB}")',
    f'wandb.login("{WANDB}")',
    f"!wandb login {WANDB}",
    f"!wandb login --host=https://x.wandb.io {WANDB}",
    f"!echo {WANDB} | wandb login",
    f"!wandb login <<< '{WANDB}'",
    f"%env WANDB_API_KEY {WANDB}",
    f'WANDB_API_KEY: str = "{WANDB}"',
    f'api_key: str | None = "{WANDB}"',
    "wandb_v1_" + MIXED,
    f'os.environ.setdefault("WANDB_API_KEY", "{WANDB}")',
    f'token: "{WANDB}"',
    f'login(token="hf_{MIXED[:34]}")',
    f"HF_TOKEN=hf_{MIXED[:34]}",
    f"git clone https://ann:{MIXED[:20]}@github.com/ann/x",
    "ghp_" + MIXED[:36],
    "gho_" + MIXED[:36],
    "github_pat_" + MIXED[:22] + "_" + MIXED + MIXED[:18],
    "glpat-" + MIXED[:20],
    "xoxb-" + "123456789012-" + MIXED[:24],
    "AIza" + MIXED[:35],
    f'openai.api_key = "sk-{MIXED}"',
    "AKIA" + "IOSFODNN7ABCDEFG",
    f'aws_secret_access_key = "{AWS}"',
    f"export AWS_SECRET_ACCESS_KEY={AWS}",
    f"%env AWS_SECRET_ACCESS_KEY {AWS}",
    f"aws configure set aws_secret_access_key {AWS}",
    PEM.format(""),
    PEM.format("RSA "),
    PEM.format("OPENSSH "),
    f'headers = {{"Authorization": "Bearer {MIXED}"}}',
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + MIXED[:30],
]
HARMLESS = [
    f'md5 = "{KAGGLE}"',
    f'assert hashlib.md5(data).hexdigest() == "{KAGGLE}"',
    f"# md5 of the archive: {KAGGLE}",
    f'words = "{KAGGLE}"',
    f'commit = "{WANDB}"',
    f"!git checkout {WANDB}",
    f"pip install git+https://github.com/huggingface/peft@{WANDB}",
    f'revision="{WANDB}"',
    f'sha1 = "{WANDB}"',
    f'sha256 = "{WANDB}{HEX}{HEX[:8]}"',
    'api_key = os.environ["WANDB_API_KEY"]',
    'wandb.login(key=UserSecretsClient().get_secret("wandb"))',
    'token = UserSecretsClient().get_secret("HF_TOKEN")',
    'login(token=os.environ["HF_TOKEN"])',
    'tokenizer = "hf_tokenizer"',
    'special_tokens = {"pad_token": "<pad>", "eos_token": "</s>"}',
    "hf_hub_download(repo, name)",
    "from transformers import AutoTokenizer as hf_Auto",
    'key = "model.layers.0.self_attn.q_proj.weight"',
    'for key, value in state.items(): print(key, "0" * 40)',
    f'uuid = "{HEX[:8]}-{HEX[:4]}-4{HEX[:3]}-8{HEX[:3]}-{HEX[:12]}"',
    'path = "/kaggle/input/datasets/ann/long-name-of-a-data-set/train.parquet"',
    "https://www.kaggle.com/code/ann/text-generation?scriptVersionId=123456789012345",
    'url = f"http://{user}:{password}@proxy:3128"',
    f"image = 'data:image/png;base64,{MIXED * 3}'",
    "sk-learn is called scikit-learn",
    "task-specific-sk-vector",
    'password = getpass("password: ")',
    'secret_seed = 1337',
    "step-00000400 of 1000",
    "-----BEGIN CERTIFICATE-----",
    f"!wandb login\n!git checkout {WANDB}",
    "wandb_v1_run",
    f'key: str = "a"; sha1 = "{WANDB}"',
    'aws_secret_access_key = os.environ["AWS_SECRET_ACCESS_KEY"]',
    "aws_secret_access_key = a_function_whose_name_is_rather_long_and_plain(1)",
    "-----BEGIN PUBLIC KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRET)
def test_a_secret_is_refused(text: str) -> None:
    assert kaggle_cli.secret_in(f"import os\n{text}\nprint(1)")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_is_not(text: str) -> None:
    assert kaggle_cli.secret_in(f"import os\n{text}\nprint(1)") is None
