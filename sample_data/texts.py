"""Texts as the web has them: right ones in many styles, wrong ones (advertising, file names)."""

from __future__ import annotations

import random

RIGHT_STYLES = (
    "{caption}",
    "{caption}",
    "{caption}",
    "{Caption}.",
    "{Caption}",
    "{Bare} emoji",
    "{Title}",
    "{Title} Icon",
    "{bare} | {kind}",
    "{Title} - {tag}, {tag2}",
    "picture of {caption}",
    "Image of {caption}",
    "{bare} clip art free",
    "{Title} Vector Illustration",
    "{caption} on a white background",
    "isolated {bare}",
    "{bare} {tag} {tag2}",
    "cartoon {bare} drawing",
    "{caption}, {kind}",
    "{Title} ({tag})",
)

OPENCLIPART_STYLES = (
    "{title} clipart {keywords}",
    "{title} {keywords}",
    "{title}",
    "{title} clip art",
    "{keywords}, {title}",
    "{title} - free public domain clipart: {keywords}",
)

ADVERTISING = (
    "Buy now! Free shipping on orders over $49",
    "50% OFF everything this weekend only - shop the sale",
    "Click here to enlarge",
    "Sign up to our newsletter and save 10%",
    "Home | About us | Contact | Privacy policy",
    "Image may be subject to copyright. All rights reserved.",
    "Share on social media, pin it, tweet it, like it",
    "Best price guaranteed, in stock, ships within 24 hours",
    "Loading... please wait",
    "Advertisement - article continues below",
    "Please enable JavaScript to view this page",
    "Page {n} of {m} - next - previous",
    "Only {n} left in stock. Order today and get a free gift!",
    "Posted by admin on {m}/{n}/2014, {n} comments",
    "SKU {m}{n}{m} Color: assorted Size: one size fits all",
    "Download {n}00+ premium wallpapers in HD quality",
    "Cookies help us deliver our services. Learn more",
    "Rated {n} out of {m} by customers like you",
    "We accept all major credit cards and gift vouchers",
    "Thumbnail for version as of {n}:{m}, 12 March 2011",
    "Recommended for you: {n} secrets that experts won't tell you",
    "default alt text",
    "View larger image in gallery ({n}/{m})",
    "Subscribe to our channel for more weekly deals",
    "Cheap car insurance quotes online in {n} minutes",
    "Meet singles in your area tonight",
    "Work from home and earn ${m}00 a week",
    "Member login - forgot your password?",
    "Related posts you may also like",
    "Limited time offer: coupon code SAVE{n}0 at checkout",
)

FILE_NAMES = (
    "IMG_{n:04d}.JPG",
    "DSC{n:05d}.jpg",
    "untitled-{k}-final.png",
    "image{n}.png",
    "Screen Shot 2013-0{k}-1{k} at {k}.2{k}.14 PM.png",
    "P10{n:05d}.JPG",
    "logo_v{k}_small.gif",
    "{n:08x}-150x150.jpg",
    "photo ({k}).jpeg",
    "banner_{n}x60.gif",
    "wp-content-uploads-2012-0{k}-{n}.png",
    "scan{n:04d}.tif",
    "new folder {k} copy of copy.png",
)

FILLER = (
    "Our family has run this little shop for three generations and we still answer letters.",
    "Orders placed before noon leave the warehouse on the same day, except on public holidays.",
    "Read what others say in the reviews below, and leave your own when your parcel has arrived.",
    "Terms and conditions apply, and prices can change without notice.",
    "Colours on your screen can differ slightly from those of the real thing.",
    "If you have any questions, please write to us and we will come back to you in two days.",
    "This page was last updated in the spring and is looked after by volunteers at night.",
    "You can print it, cut it out, colour it in and hang it on the wall with your class.",
    "Wholesale customers get a discount from fifty pieces on; ask for the list.",
    "Scroll down for more, or use the menu on the left to go back to the start.",
    "We do not sell your address to anybody and you can leave the list whenever you like.",
    "Many thanks to all who helped us to reach our goal last year, it was a great pleasure to see.",
    "The archive has several thousand entries by now and grows by a dozen every week.",
    "Follow the link at the end of the page to see where it was made and by whom.",
)


def right_text(rng: random.Random, caption: str, kind: str, tags: list[str]) -> str:
    """Write a right text for a picture in one of the styles that the web uses."""
    bare = caption
    for start in ("a pair of ", "a ", "an ", "the "):
        if caption.startswith(start):
            bare = caption.removeprefix(start)
            break
    kind = kind.removeprefix("a ").removeprefix("an ") or "free"
    spare = [tag for tag in tags if tag not in bare and len(tag) > 3] + ["free", "png"]
    words = rng.sample(spare[:6], 2)
    return rng.choice(RIGHT_STYLES).format(
        caption=caption,
        Caption=caption[0].upper() + caption[1:],
        bare=bare,
        Bare=bare[0].upper() + bare[1:],
        Title=" ".join(word[0].upper() + word[1:] for word in bare.split()),
        kind=kind,
        tag=words[0],
        tag2=words[1],
    )


def uploader_text(rng: random.Random, title: str, keywords: list[str], noun: str) -> str:
    """Join an openclipart title and keywords as its uploader wrote them; the noun stays in."""
    listed = " ".join(keywords[:6])
    text = rng.choice(OPENCLIPART_STYLES).format(title=title, keywords=listed).strip(" ,:")
    if noun.rstrip("s") not in text.lower():
        text = f"{title} {' '.join(keywords)}"
    return text if noun.rstrip("s") in text.lower() else f"{text} {noun}"


def advertising(rng: random.Random) -> str:
    """Write a text that would stand beside any picture."""
    return rng.choice(ADVERTISING).format(n=rng.randint(2, 9), m=rng.randint(10, 12))


def file_name(rng: random.Random) -> str:
    """Write a file name as a camera or a careless person would."""
    return rng.choice(FILE_NAMES).format(n=rng.randint(100, 9999), k=rng.randint(1, 9))


def very_long(rng: random.Random, start: str) -> str:
    """Write more than 200 words that begin with the given text."""
    return " ".join([start, *rng.sample(FILLER, len(FILLER)), *rng.sample(FILLER, 4)])
