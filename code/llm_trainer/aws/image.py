# SPDX-License-Identifier: Apache-2.0
"""Images in ECR: the digest behind a tag, since a tag may name another image tomorrow."""

import re
from dataclasses import dataclass

from llm_trainer.aws.clients import find_region, open_client
from llm_trainer.common.errors import UserError

ECR_URI = re.compile(
    r"(?P<registry>(?P<account>\d{12})\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.[a-z0-9.-]+)/(?P<rest>.+)"
)
NAME = re.compile(r"(?P<repository>[a-z0-9][a-z0-9._/-]*)(:(?P<tag>[\w.-]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?")


@dataclass(frozen=True)
class Image:
    """An image as it was given. Registry, account and region are those of this account where it names none."""

    registry: str | None
    account: str | None
    region: str | None
    repository: str
    tag: str
    digest: str | None


def parse_image(text: str) -> Image:
    """Return the parts of an image's URI in ECR, or of `repository:tag`. Raises UserError for any other text."""
    uri = ECR_URI.fullmatch(text)
    name = NAME.fullmatch(uri["rest"] if uri else text)
    first = text.partition("/")[0]
    if name is None or (uri is None and ("." in first or ":" in first) and "/" in text):
        raise UserError(
            f"image={text!r} is no image in ECR: write ACCOUNT.dkr.ecr.REGION.amazonaws.com/REPOSITORY:TAG, or "
            "REPOSITORY:TAG; SageMaker takes images from ECR alone."
        )
    registry, account, region = (uri["registry"], uri["account"], uri["region"]) if uri else (None, None, None)
    return Image(registry, account, region, name["repository"], name["tag"] or "latest", name["digest"])


def resolve_image(text: str) -> str:
    """Return the URI of an image with its digest. Raises UserError where ECR does not have it."""
    image = parse_image(text)
    if image.registry and image.digest:
        return f"{image.registry}/{image.repository}@{image.digest}"
    region = image.region or find_region()
    which = {"imageDigest": image.digest} if image.digest else {"imageTag": image.tag}
    registry = {"registryId": image.account} if image.account else {}
    client = open_client("ecr", region)
    try:
        answer = client.describe_images(repositoryName=image.repository, imageIds=[which], **registry)
    except (client.exceptions.RepositoryNotFoundException, client.exceptions.ImageNotFoundException) as error:
        raise UserError(
            f"image={text!r} is not in ECR in {region}: push it (`make push`), or give another tag or region."
        ) from error
    (found,) = answer["imageDetails"]
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    host = image.registry or f"{found['registryId']}.dkr.ecr.{region}.{suffix}"
    return f"{host}/{image.repository}@{found['imageDigest']}"
