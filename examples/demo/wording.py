# SPDX-License-Identifier: Apache-2.0
"""The phrases that the demo's messages are put together from: those the model is taught, and those it never saw."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    greetings: tuple[str, ...]
    requests: dict[str, tuple[str, ...]]
    items: tuple[str, ...]


TAUGHT = Wording(
    greetings=("Hello,", "Hi,", "Hi there,", "Good morning,", "Dear team,", ""),
    requests={
        "refund": (
            "please refund the {item} from {order}.",
            "the {item} from {order} is broken, I want my money back.",
            "you charged me twice for the {item} in {order}, please pay me back.",
            "I returned the {item} from {order} and want my money.",
            "the {item} never worked, I want a refund for {order}.",
            "{order}: the {item} fell apart, please give me my money back.",
        ),
        "cancel": (
            "please cancel {order}, I do not need the {item}.",
            "I no longer want the {item} in {order}, please stop it.",
            "I ordered the {item} by mistake, cancel {order}.",
            "do not ship the {item} in {order}, I changed my mind.",
            "stop {order}, I found the {item} elsewhere.",
            "can you cancel the {item} in {order}?",
        ),
        "track": (
            "where is the {item} from {order}?",
            "the {item} from {order} has not arrived.",
            "when will {order} with the {item} be delivered?",
            "I am still waiting for the {item} from {order}.",
            "has {order} with the {item} been shipped yet?",
            "{order}: when does my {item} come?",
        ),
        "exchange": (
            "please exchange the {item} from {order} for a larger one.",
            "I want to swap the {item} from {order}.",
            "can I exchange {order}? I want another {item}.",
            "the {item} in {order} has the wrong colour, please swap it.",
            "you sent the wrong {item} in {order}, please exchange it.",
            "{order}: the {item} is too small, I need a larger one.",
        ),
        "invoice": (
            "please send the invoice for the {item} from {order}.",
            "I need a receipt for {order}, the {item}.",
            "I cannot find the invoice of the {item} from {order}.",
            "my accountant needs the bill for {order}, the {item}.",
            "can I have an invoice for the {item}, {order}?",
            "the receipt for {order} is missing, it was a {item}.",
            "{order}: please put our VAT number on the invoice of the {item}.",
        ),
    },
    # Many, so that copying the customer's word is easier to learn than a list of items.
    items=(
        "kettle",
        "desk lamp",
        "backpack",
        "rain jacket",
        "coffee grinder",
        "bike helmet",
        "office chair",
        "blender",
        "alarm clock",
        "keyboard",
        "tent",
        "toaster",
        "yoga mat",
        "frying pan",
        "sofa",
        "water bottle",
        "mirror",
        "garden hose",
        "vase",
        "headset",
        "tea pot",
        "bookshelf",
        "wallet",
        "power drill",
        "violin",
        "wool blanket",
        "rice cooker",
        "sunglasses",
        "trumpet",
        "hammock",
        "carpet",
        "picture frame",
        "running shoes",
        "microwave",
        "chess set",
        "piano stool",
        "winter coat",
        "router",
        "fish tank",
        "surfboard",
        "linen shirt",
        "hand mixer",
        "tripod",
        "cello",
        "bread knife",
        "doormat",
        "wrist watch",
        "cotton towel",
        "fan heater",
        "skateboard",
        "drum kit",
        "leather belt",
        "bird feeder",
        "globe",
        "night stand",
        "wool gloves",
        "paint brush",
        "harmonica",
        "beach chair",
        "telescope",
        "gas lighter",
        "salad bowl",
        "ukulele",
        "candle holder",
        "scanner",
        "hiking boots",
        "rolling pin",
        "banjo",
        "silk tie",
        "camera bag",
        "wine glass",
        "tool box",
    ),
)

UNTAUGHT = Wording(
    greetings=("Good evening,", "Hello support,", "To whom it may concern,"),
    requests={
        "refund": (
            "I would like a refund for the {item} in {order}.",
            "give me back the money for {order}, the {item} is faulty.",
        ),
        "cancel": (
            "I want to cancel my {item}, it is {order}.",
            "we do not need the {item} any more, please cancel {order}.",
        ),
        "track": (
            "could you tell me where {order} is now? I expected the {item} last week.",
            "{order} should be here by now, where is the {item}?",
        ),
        "exchange": (
            "I would like to exchange my {item}, it was {order}.",
            "{order} has the {item} in the wrong size, please swap it.",
        ),
        "invoice": (
            "I need an invoice for my {item}, it was {order}.",
            "our bookkeeping is missing the receipt of {order}, the {item}.",
        ),
    },
    items=("umbrella", "camping stove", "guitar", "ladder", "wine rack", "sleeping bag", "printer", "wool scarf"),
)
