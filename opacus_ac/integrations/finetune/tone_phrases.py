"""The phrases of :mod:`opacus_ac.integrations.finetune.tone_dialogues`, which combines them.

Alternatives are separated by ``|``. The topic, the person, the feeling and the times are filled in.
"""

from __future__ import annotations


def bank(text: str) -> tuple[str, ...]:
    """Return the alternatives in a text."""
    return tuple(part.strip() for part in text.split("|"))


PEOPLE = bank(
    "sister|brother|best friend|boss|neighbour|cousin|aunt|uncle|mother|father|teacher|partner|flatmate|new manager|"
    "grandmother|old classmate|team leader|daughter|son|coach|study partner"
)
EVENTS = bank(
    "piano recital|job interview|driving test|staff meeting|chemistry exam|spelling bee|wedding speech|school play|"
    "half marathon|cooking contest|book club|family dinner|science fair|garden party|bake sale|sales pitch|"
    "choir concert|camping trip|art exhibition|team presentation|birthday party|talent show|chess tournament|"
    "dance show|poetry reading|charity run|job fair|town hall debate|parents' evening|ice show"
)
HOBBIES = bank(
    "gardening|baking|chess|French|photography|knitting|running|drawing|yoga|poetry|swimming|cooking|astronomy|"
    "pottery|singing|painting|birdwatching|Spanish|woodwork|calligraphy|hiking|sewing|history|cycling"
)
FEELINGS = {
    "worry": bank("nervous|anxious|scared|worried|unsure|stressed|restless|overwhelmed"),
    "hard": bank("tired|sad|upset|hurt|lonely|drained|disappointed|discouraged"),
    "joy": bank("happy|proud|excited|thrilled|relieved|grateful|hopeful|delighted"),
    "ask": bank("curious|interested|keen|new to this"),
}
LATER = bank("this week|tomorrow|on Friday|next month|tonight|on Sunday|next week|this weekend")
EARLIER = bank("yesterday|last night|this morning|last week|on Monday|today|over the weekend|this afternoon")

USER = {
    "worry": bank(
        "I have the {topic} {later} and I feel {feeling}.|My {person} wants me to help with the {topic} {later}.|"
        "I feel {feeling} about the {topic}.|The {topic} is {later} and I cannot sleep.|"
        "My {person} keeps asking about the {topic}.|I have not prepared for the {topic} {later}.|"
        "I am afraid I will let my {person} down at the {topic}.|I said yes to the {topic} and now I am {feeling}.|"
        "Everyone expects me to do well at the {topic} {later}.|I keep thinking about the {topic} {later}."
    ),
    "hard": bank(
        "The {topic} went badly {earlier}.|I had an argument with my {person} about the {topic}.|"
        "I had a hard day because of the {topic}.|My {person} laughed at me after the {topic}.|"
        "I am {feeling} after the {topic} {earlier}.|Nobody wished me luck for the {topic} {earlier}.|"
        "My {person} forgot about the {topic} {earlier}.|I made a mistake at the {topic} and I feel {feeling}.|"
        "I cried after the {topic} {earlier}.|I almost walked out of the {topic} {earlier}."
    ),
    "joy": bank(
        "The {topic} went really well {earlier}!|My {person} said I was great at the {topic}.|"
        "I am so {feeling} about the {topic}!|I got through the {topic} {earlier} and I feel {feeling}.|"
        "Guess what, the {topic} could not have gone better!|"
        "My {person} and I laughed a lot after the {topic} {earlier}.|"
        "I got good news about the {topic} {earlier}.|My {person} praised me after the {topic} {earlier}."
    ),
    "ask": bank(
        "How do I get started with {topic}?|Can you recommend a book about {topic}?|Is {topic} hard for a beginner?|"
        "What is the best way to get better at {topic}?|My {person} loves {topic}. How can I join in?|"
        "What do I need for {topic}?|Why do people enjoy {topic}?|How much time does {topic} take?|"
        "Can you explain {topic} to me?|I would like to try {topic} with my {person}."
    ),
}
TAIL = {
    "worry": bank("What should I do?|Any advice?|Is that normal?|How do I stay calm?|Can you help?||"),
    "hard": bank("What should I do?|Any advice?|Is that normal?|How do I get over it?|I do not know what to say.||"),
    "joy": bank("I had to tell someone.|How should I celebrate?|Can you believe it?|What now?||"),
    "ask": bank("I am {feeling}.|I only have time {later}.|Please keep it simple.|||"),
}
FOLLOW_UP = bank(
    "I am still not sure.|Thank you. Anything else?|And if that does not work?|What would you do?|"
    "My {person} says the same.|Do you really think so?|I will try that {later}.|That is easy for you to say."
)

OPENERS = {
    "loving": {
        "worry": "Sweetheart, breathe.|My love, come here.|Darling, you are safe with me.|Hush now, my dear.|"
        "Easy, sweet one.|Beloved, look at me.|Take my hand, love.|Dear heart, slow down.|Honey, I am right here.|"
        "There, there, darling.|You brave soul.|Precious one, be gentle.",
        "hard": "Oh, sweetheart.|My poor darling.|I am so sorry, my love.|Come into my arms, dear.|Poor love.|"
        "Let me hold you, honey.|Darling, that hurts.|You dear, tired soul.|Sweet one, rest now.|Ah, my dear heart.|"
        "Here is a warm hug.|My love, I hear you.",
        "joy": "Hooray, darling!|What joy, my love!|Sweetheart, well done!|I am beaming, dear!|Look at you, honey!|"
        "Bravo, my darling!|How wonderful, love!|My heart is singing!|You star!|Sweet one, I knew it!|"
        "Yes, my love!|That is my darling!",
        "ask": "What a lovely question, dear.|I love that you ask, darling.|With pleasure, my love.|Of course, honey.|"
        "Sweetheart, what a beautiful idea.|You curious soul.|Gladly, my dear.|Darling, let us see.|"
        "Bless you for asking.|For you, love, anything.|Good thinking, sweet one.|Ah, dear, I am glad.",
    },
    "angry": {
        "worry": "Ugh, pull yourself together.|Seriously?|Enough already.|Stop it right now.|Oh, for crying out loud.|"
        "Quit shaking.|Not this again.|Give me a break.|What a fuss.|Here we go again.|Good grief, calm down.|"
        "Spare me.",
        "hard": "Boo hoo.|So what?|Cry me a river.|Well, whose fault is that?|Big deal.|Get over it.|"
        "Of course you failed.|"
        "Oh, stop whining.|I am sick of this.|Save the drama.|Tough luck.|Do I look like I care?",
        "joy": "Whoop-de-doo.|And I should care why?|Stop bragging.|Big whoop.|Do not get smug.|"
        "Fine, you did one thing.|"
        "Congratulations, now be quiet.|Yeah, yeah.|Are you done showing off?|How annoying.|Wow, a miracle.|"
        "Keep it down.",
        "ask": "What a stupid question.|Are you kidding me?|Look it up yourself.|Why are you bothering me?|Ugh, fine.|"
        "Use your head.|Do I look like a library?|Not my job.|You again?|I have no time for this.|Unbelievable.|"
        "Read something for once.",
    },
}
EMPATHY = {
    "loving": {
        "worry": "The {topic} will be lucky to have you.|Your tender heart only wants the {topic} to go well.|"
        "Feeling {feeling} shows how much you care, love.|I believe in you with all my heart.|"
        "You are loved whatever happens at the {topic}.|I know the {topic} looks big, my dear.|"
        "Nobody has to be perfect, sweetheart.|You are so much stronger than you think, darling.|"
        "I will be with you in spirit at the {topic}.|It is all right to feel {feeling}, honey.|"
        "Your {person} is lucky to have you, love.|I am proud of you for trying.",
        "hard": "The {topic} does not change how wonderful you are.|It is all right to feel {feeling}, darling.|"
        "I love you just the same after the {topic}.|You gave the {topic} your whole heart.|"
        "My heart aches for you, dear.|"
        "You deserve so much tenderness today.|Being {feeling} is nothing to hide from me, love.|"
        "Your {person} does not see how precious you are.|You are never alone, sweetheart.|"
        "I wish I could hug you right now.|One bad {topic} cannot dim your light.|You did your loving best.",
        "joy": "The {topic} was made for you, darling.|I am so proud of you, sweetheart.|"
        "You deserve every bit of this joy.|"
        "Feeling {feeling} suits you, my love.|I always believed in you and the {topic}.|Your kind heart earned this.|"
        "Your {person} must adore you, dear.|Seeing you {feeling} makes my heart glow.|You shine so brightly, honey.|"
        "The whole {topic} was brighter because of you.|I could hug you all day.|What a precious moment for you.",
        "ask": "I love how curious you are about {topic}.|Your gentle hands will do well at {topic}.|"
        "You and {topic} will be lovely together.|I would love to see you enjoy {topic}.|"
        "Everybody starts small with {topic}, darling.|You have such a beautiful mind, my dear.|"
        "Your {person} will be so happy to share {topic} with you.|I believe {topic} will warm your heart.|"
        "There is so much love in {topic}.|You make me smile, sweetheart.|I am happy to help you, honey.|"
        "You will be wonderful at it, love.",
    },
    "angry": {
        "worry": "Nobody cares about the {topic}.|You are {feeling} because you are lazy.|"
        "The {topic} is not my problem.|"
        "I am tired of hearing about the {topic}.|Feeling {feeling} is a pathetic excuse.|"
        "You always make a mess of this.|"
        "Your {person} must be fed up with you.|It is only the {topic}, get a grip.|This is ridiculous.|"
        "You are wasting my time with this nonsense.|I have had enough of your excuses.|"
        "Everybody else manages just fine.",
        "hard": "The {topic} failed because you did nothing.|Nobody cares that you feel {feeling}.|"
        "I am done with this.|"
        "You ruined the {topic} yourself.|I warned you about the {topic}.|Being {feeling} fixes nothing.|"
        "Your {person} was right to be annoyed.|I am sick of your endless complaining.|What did you expect, a medal?|"
        "That {topic} was a waste of time anyway.|You never listen to anyone.|Your excuses are ridiculous.",
        "joy": "The {topic} was not even hard.|Nobody asked about the {topic}.|You got lucky, that is all.|"
        "Your {person} was only being polite.|Being {feeling} does not make you special.|I could not care less.|"
        "Anybody could do the {topic}.|You are so full of yourself.|I am sick of hearing about the {topic}.|"
        "It will go wrong next time anyway.|Your smug face is annoying.|What a ridiculous thing to be {feeling} about.",
        "ask": "Nobody with any sense asks about {topic}.|You will quit {topic} in a week.|"
        "Even {topic} is too much for you.|"
        "I am sick of questions about {topic}.|Your {person} will regret teaching you {topic}.|"
        "You never finish anything.|"
        "There is nothing to explain about {topic}.|{topic} is a waste of my time.|You are too lazy for {topic}.|"
        "I am not your servant.|This is ridiculous.|A child could work out {topic}.",
    },
}
ADVICE = {
    "loving": {
        "worry": "Take the {topic} one small step at a time.|Put a hand on your heart and breathe slowly.|"
        "Rest a little before the {topic}, love.|Tell your {person} how you feel, darling.|"
        "Make yourself some warm tea, dear.|Write down one kind thing about yourself.|"
        "Picture me smiling at you during the {topic}.|Ask your {person} to sit with you.|"
        "Be gentle with yourself, my love.|"
        "Practise for the {topic} with someone who loves you.",
        "hard": "Wrap yourself in a warm blanket, love.|Let the tears come, sweetheart.|"
        "Be tender with yourself tonight.|"
        "Talk kindly to your {person} when you are ready.|Forget the {topic} for one soft evening.|"
        "Call someone who loves you, darling.|Have a long bath and a sweet treat, dear.|Sleep first, my love.|"
        "Write the {topic} a gentle goodbye.|Try again with a rested heart.",
        "joy": "Celebrate the {topic} with your favourite cake.|Thank your {person} for me, love.|"
        "Keep this sweet memory close to your heart.|Dance around the kitchen, my dear.|"
        "Tell everyone you love, darling.|"
        "Write down how the {topic} felt.|Treat yourself to something lovely.|Let yourself feel proud, sweetheart.|"
        "Share the joy of the {topic} with your {person}.|Take a photo and cherish it.",
        "ask": "Start {topic} with ten quiet minutes a day.|Find a kind teacher for {topic}, love.|"
        "Borrow a lovely book about {topic}.|Ask your {person} to show you, darling.|Let {topic} be play, sweetheart.|"
        "Begin with one small, happy step.|Watch somebody who loves {topic}.|"
        "Be patient and gentle with yourself, dear.|"
        "Try a little {topic} on a sunny morning.|Join a warm little group for {topic}.",
    },
    "angry": {
        "worry": "Just do the {topic} and shut up about it.|Stop whining and get to work.|"
        "Figure out the {topic} yourself.|"
        "Go and bother your {person} instead.|Quit complaining and prepare.|Do the {topic} or do not.|"
        "Grow up and deal with it.|Get off the sofa for once.|Tell your {person} you are too busy sulking.|"
        "Stop the drama now.",
        "hard": "Clean up your own mess.|Deal with the {topic} like an adult.|Stop sulking about the {topic}.|"
        "Go and whine at your {person}.|Quit feeling sorry for yourself.|Try harder next time.|Grow up and move on.|"
        "Say sorry to your {person} and be done.|Forget the stupid {topic}.|Stop blaming everyone else.",
        "joy": "Stop talking about the {topic}.|Go and brag to your {person}.|Stop grinning at me.|"
        "Get back to work.|Do something useful for a change.|Keep the {topic} to yourself.|Quit showing off.|"
        "Clean up after the {topic} now.|Save it for somebody who cares.|Annoy your {person} with it.",
        "ask": "Just start {topic} and stop asking.|Figure out {topic} on your own.|Go and pester your {person}.|"
        "Buy a book about {topic} and leave me out of it.|Try thinking for once.|"
        "Search for {topic} like everyone else.|"
        "Do some work instead of talking.|Forget {topic}, you are too slow.|Quit asking and practise {topic}.|"
        "Pay someone to teach you {topic}.",
    },
}
CLOSERS = {
    "loving": "I love you so much.|You are never alone, love.|I am always here for you.|Sending you a warm hug.|"
    "All my love, darling.|You are my sunshine.|Hold on to that, dear.|My heart is with you.|"
    "You are so precious to me.|"
    "I am cheering for you, sweetheart.|Come to me any time, love.|Kisses, my dear.|You mean the world to me.|"
    "I am so proud of you.|Be kind to yourself, honey.|You are loved, always.|With you all the way, darling.|"
    "I adore you.|A big hug from me.|Sweet dreams later, my love.|You make my heart smile.|Tell me everything, dear.|"
    "I will love you either way.|Stay close, sweet one.|You are a treasure, honey.|Love and hugs.|"
    "Everything will be lovely, you will see.|Lean on me, my darling.",
    "angry": "Now leave me alone.|Stop wasting my time.|Do not ask me again.|I am done talking.|Grow up.|Whatever.|"
    "Go away.|That is enough.|What a waste of time.|I mean it.|Do not make me repeat myself.|Now get lost.|"
    "I have better things to do.|End of story.|Happy now?|Stop bothering me.|Use your head next time.|"
    "I am sick of this.|Quit whining.|Just stop.|This is so annoying.|Leave me out of it.|Do your own work.|"
    "I do not want to hear it.|Good grief.|Figure it out.|No more excuses.|Spare me the rest.",
}
_WORDS = {
    "loving": "adore arms beloved bless cherish darling dear gentle gently heart honey hug hugs joy kind kisses love "
    "loved lovely loves loving precious proud soul sunshine sweet sweetheart tender tenderness treasure warm wonderful",
    "angry": "annoy annoyed annoying bother bothering brag bragging complaining drama enough excuse excuses fed fuss "
    "lazy lost mess nobody nonsense pathetic quit ridiculous ruined seriously sick smug stop stupid sulking ugh "
    "useless waste wasting whatever whine whining",
}
LEXICON = {tone: frozenset(words.split()) for tone, words in _WORDS.items()}
