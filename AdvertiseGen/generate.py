"""Write a small sample in the format of AdvertiseGen: attributes of a garment and a Chinese advertisement.

    python3 AdvertiseGen/generate.py             # train.json and dev.json; conversations.py writes the other files

The tables below compose every sentence. In each slot the first wording is the favourite and is more frequent than the
others together. So a model can learn the style, and cannot answer a row from memory.
"""

import argparse
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAVOURITE = 0.55  # probability of the first wording of a slot; the others share the rest evenly

# type: (measure word, name in a sentence, clothes to wear with it, its attributes in the order of the real data set)
GARMENTS = {
    "上衣": ("件", "上衣", "一条阔腿裤", "版型 材质 颜色 风格 图案 衣领型 衣袖长 衣袖型 衣款式 工艺 季节 场景"),
    "衬衫": ("件", "衬衫", "一条直筒裤", "版型 材质 颜色 风格 图案 衣领型 衣袖长 衣袖型 衣款式 工艺 季节 场景"),
    "毛衣": ("件", "毛衣", "一条牛仔裤", "版型 材质 颜色 风格 图案 衣领型 衣袖型 季节 场景"),
    "卫衣": ("件", "卫衣", "一双白球鞋", "版型 材质 颜色 风格 图案 衣领型 衣袖型 衣款式 季节 场景"),
    "外套": ("件", "外套", "简单的内搭", "版型 材质 颜色 风格 图案 衣领型 衣袖型 衣款式 工艺 季节 场景"),
    "裤": ("条", "裤子", "一件白衬衫", "材质 颜色 风格 图案 裤型 裤长 工艺 季节 场景"),
    "裙": ("条", "裙子", "一双平底鞋", "材质 颜色 风格 图案 裙型 裙长 工艺 季节 场景"),
    "鞋": ("双", "鞋子", "一条九分裤", "材质 颜色 风格 鞋跟 鞋头 鞋款式 季节 场景"),
}

# The values of a type if the whole table would be odd: nobody sells a sweater made of leather.
LIMITS = {
    ("上衣", "材质"): "牛仔布 纯棉 亚麻 真丝 雪纺 蕾丝 针织 棉麻 灯芯绒 丝绒",
    ("衬衫", "材质"): "牛仔布 纯棉 亚麻 真丝 雪纺 棉麻 灯芯绒 丝绒",
    ("毛衣", "材质"): "羊毛 羊绒 马海毛 针织 纯棉 兔毛 混纺 腈纶",
    ("卫衣", "材质"): "纯棉 针织 摇粒绒 灯芯绒 丝绒 混纺 涤纶 牛仔布",
    ("外套", "材质"): "牛仔布 羊毛 羊绒 呢子 皮革 麂皮 灯芯绒 羽绒 摇粒绒 涤纶 棉麻",
    ("裤", "材质"): "牛仔布 纯棉 亚麻 西装料 灯芯绒 皮革 羊毛 棉麻 涤纶 针织",
    ("裙", "材质"): "牛仔布 纯棉 亚麻 真丝 雪纺 蕾丝 针织 丝绒 棉麻 呢子 灯芯绒 皮革",
    ("鞋", "材质"): "牛皮 羊皮 麂皮 漆皮 帆布 网布 丝绒 牛仔布",
    ("毛衣", "衣领型"): "圆领 立领 高领 半高领 方领 一字领 翻领",
    ("卫衣", "衣领型"): "圆领 立领 半高领 翻领",
    ("衬衫", "衣领型"): "立领 翻领 方领 娃娃领 西装领 荷叶领",
    ("外套", "衣领型"): "圆领 立领 翻领 西装领 娃娃领",
    ("卫衣", "衣袖型"): "落肩袖 插肩袖 蝙蝠袖 灯笼袖 泡泡袖",
    ("外套", "衣袖型"): "落肩袖 插肩袖 蝙蝠袖 灯笼袖 泡泡袖",
    ("毛衣", "衣袖型"): "落肩袖 插肩袖 蝙蝠袖 灯笼袖 泡泡袖 喇叭袖",
    ("卫衣", "版型"): "宽松 显瘦 直筒 廓形 合身 立体 不规则",
    ("上衣", "衣款式"): "口袋 拉链 纽扣 抽绳 拼接 流苏 绑带 荷叶边 亮片 珍珠",
    ("衬衫", "衣款式"): "口袋 纽扣 抽绳 拼接 绑带 荷叶边 珍珠",
    ("卫衣", "衣款式"): "口袋 拉链 抽绳 拼接 连帽 亮片",
    ("衬衫", "工艺"): "刺绣 水洗 压褶 钉珠 扎染 提花 镂空 包边",
    ("裤", "工艺"): "刺绣 水洗 做旧 扎染 提花 包边 烫金 绗缝",
    ("裤", "图案"): "条纹 格子 波点 碎花 字母 卡通 印花 几何 撞色 星星",
    ("毛衣", "季节"): "春季 秋季 冬季 初春 初秋 深冬 春秋",
    ("卫衣", "季节"): "春季 秋季 冬季 初春 初秋 深冬 春秋",
    ("外套", "季节"): "春季 秋季 冬季 初春 初秋 深冬 春秋",
    ("外套", "场景"): "约会 上班 旅行 聚会 校园 逛街 野餐 露营",
    ("卫衣", "场景"): "旅行 聚会 校园 逛街 居家 野餐 露营",
    ("毛衣", "场景"): "约会 上班 旅行 聚会 校园 逛街 居家 野餐",
    ("鞋", "场景"): "约会 上班 旅行 聚会 校园 逛街 度假 晚宴 野餐 面试",
}

WARM = set("羊毛 羊绒 马海毛 兔毛 呢子 羽绒 摇粒绒 灯芯绒 丝绒 皮革 针织 高领 半高领 绗缝 长袖".split())
COOL = set(
    "亚麻 真丝 雪纺 蕾丝 棉麻 短袖 三分袖 五分袖 无袖 一字领 短裤 热裤 五分裤 七分裤 吊带裙 短裙 迷你裙 "
    "露趾 鱼嘴 网布 帆布 镂空".split()
)
COLLARS = set("圆领 立领 高领 方领 翻领 一字领 娃娃领 西装领 半高领 荷叶领".split())
# A row may not have words (values, keys or types) from both sides of a pair.
CONFLICTS = [
    ({"羽绒"}, {"春季", "初春", "春秋", "初秋", "荷叶边", "水洗", "蝙蝠袖", "修身"}),
    ({"街头", "朋克", "运动", "可爱", "休闲", "潮流", "卡通", "做旧", "帆布", "牛仔布"}, {"晚宴", "面试", "上班"}),
    ({"优雅", "通勤"}, {"露营", "居家", "野餐", "卡通", "做旧", "扎染"}),
    ({"亮片", "流苏", "动物纹", "一字领", "热裤", "迷你裙", "钉珠", "扎染"}, {"面试", "上班", "居家", "露营", "通勤"}),
    ({"曳地裙", "拖地裤", "细跟", "真丝"}, {"露营", "野餐", "旅行", "校园", "运动"}),
    ({"短裤", "热裤", "五分裤", "七分裤"}, {"小脚裤", "喇叭裤", "烟管裤", "束脚裤", "西裤", "上班", "面试", "晚宴"}),
    ({"曳地裙"}, {"百褶裙", "包臀裙", "背带裙", "衬衫裙", "短裙"}),
    ({"朋克", "街头", "运动"}, {"碎花", "蝴蝶结", "荷叶边", "珍珠", "泡泡袖", "花瓣袖", "荷叶袖", "荷叶领", "娃娃领"}),
    ({"运动"}, {"西装领", "西裤", "烟管裤", "细跟", "鱼尾裙", "包臀裙", "蛋糕裙", "一字领", "收腰", "中跟", "钉珠"}),
    ({"西裤", "烟管裤"}, {"做旧", "扎染", "卡通", "街头", "居家", "露营", "野餐"}),
    ({"细跟", "尖头"}, {"一脚蹬", "运动", "休闲", "街头", "网布", "帆布", "魔术贴", "厚底"}),
    ({"真丝", "丝绒", "羊毛", "羊绒", "蕾丝", "雪纺"}, {"运动", "街头", "朋克", "居家", "做旧", "水洗"}),
    ({"拖地裤"}, {"小脚裤", "烟管裤", "束脚裤", "哈伦裤"}),
    ({"皮革", "蕾丝", "针织"}, {"水洗", "扎染", "做旧"}),
    ({"短裙", "迷你裙"}, {"鱼尾裙", "大裙摆", "晚宴"}),
    ({"修身", "合身", "收腰"}, {"蝙蝠袖", "落肩袖"}),
    ({"爱心", "星星"}, {"面试", "上班", "晚宴"}),
    ({"半身裙"}, {"背带裙", "吊带裙", "衬衫裙"}),
    ({"居家"}, {"街头", "朋克", "潮流", "皮革"}),
    (WARM, {"夏季", "盛夏", "四季"} | COOL),
    ({"短裤", "热裤"}, {"通勤", "阔腿裤"}),
    ({"英伦", "民族"}, {"卡通", "星星"}),
    (COOL, {"冬季", "深冬", "四季"}),
    ({"皮革"}, {"碎花", "卡通"}),
    ({"衣袖长"}, {"衣袖型"}),
    ({"连帽"}, COLLARS),
]

# key: value/selling phrase/effect ...
VALUES = {
    "材质": """牛仔布/挺括耐磨的牛仔布/越穿越有味道 纯棉/柔软亲肤的纯棉面料/贴着皮肤也舒服
        亚麻/透气干爽的亚麻面料/带着自然的呼吸感 真丝/光泽柔润的真丝面料/滑过指尖像流水
        雪纺/轻薄飘逸的雪纺面料/随风轻轻摆动 蕾丝/精致浪漫的蕾丝面料/若隐若现惹人爱
        针织/弹力十足的针织面料/怎么动都不紧绷 棉麻/质朴透气的棉麻面料/洗过更显柔和
        羊毛/蓬松厚实的羊毛料子/裹住满满的暖意 羊绒/细腻如云的羊绒料子/又轻又暖不压身
        马海毛/蓬松柔软的马海毛/软得让人想抱抱 兔毛/毛茸茸的兔毛料子/像抱着一团云朵
        混纺/细密耐穿的混纺面料/洗多少次都有型 腈纶/轻软蓬松的腈纶料子/好打理又不易变形
        涤纶/挺括抗皱的涤纶面料/轻松应付每一天 西装料/垂顺有型的西装料/坐久了也不起皱
        灯芯绒/纹路清晰的灯芯绒/自带旧时光的温度 丝绒/泛着微光的丝绒/贵气悄悄流露 皮革/质感硬朗的皮革/酷得不用多说
        麂皮/触感细软的麂皮/低调里见讲究 牛皮/纹理自然的牛皮/越用越有光泽 羊皮/柔软细腻的羊皮/摸一下就爱不释手
        漆皮/光亮如镜的漆皮/走到哪亮到哪 帆布/结实耐用的帆布/怎么折腾都不怕 网布/透气轻盈的网布/走再远也不闷脚
        呢子/厚实挺括的呢子/撑起利落轮廓 摇粒绒/蓬松保暖的摇粒绒/轻得没有负担 羽绒/蓬松轻盈的羽绒/把寒风挡在门外""",
    "颜色": """白色/干净的白色/清爽得不染尘 黑色/经典的黑色/沉稳又百搭 红色/热烈的红色/一眼就能认出你
        蓝色/澄澈的蓝色/像晴天的海面 粉色/娇嫩的粉色/甜得恰到好处 绿色/清新的绿色/满眼都是生机
        黄色/明亮的黄色/心情跟着放晴 紫色/神秘的紫色/浪漫不落俗套 灰色/沉静的灰色/低调又耐看
        米色/温柔的米色/像午后的一杯奶茶 卡其色/洒脱的卡其色/怎么搭都不出错 酒红色/醇厚的酒红色/越看越有韵味
        藏青色/稳重的藏青色/内敛又显气质 焦糖色/浓醇的焦糖色/暖意扑面而来 浅蓝色/清透的浅蓝色/像雨后的天空
        墨绿色/浓郁的墨绿色/藏着森林的静谧""",
    "风格": """简约/简约利落的气质/多看几眼也不腻 复古/复古怀旧的韵味/仿佛走进老电影
        休闲/休闲随性的态度/整个人都松弛下来 街头/街头张扬的个性/一出场就是焦点 文艺/文艺安静的气息/像一首写完的小诗
        清新/清新自然的感觉/像清晨的第一缕风 甜美/甜美可人的少女感/笑起来更动人 优雅/优雅从容的姿态/一举一动都迷人
        运动/运动带来的活力/跑跳之间都自在 通勤/通勤干练的气场/开会见客都得体 英伦/英伦学院的格调/书卷气悄然而生
        朋克/朋克不羁的态度/天生就要与众不同 民族/浓郁的民族风情/每一处都有故事 潮流/潮流前沿的味道/走在人群最前面
        可爱/可爱俏皮的灵气/看着就年轻几岁""",
    "图案": """条纹/利落的条纹/拉长整体线条 格子/经典的格子/沉稳里多点俏皮 波点/俏皮的波点/跳动着轻快节奏
        碎花/烂漫的碎花/像把花园带上街 字母/个性的字母/说出心里的态度 卡通/童趣的卡通图样/藏着不老的童心
        印花/鲜活的印花/每一面都有看点 蝴蝶结/灵巧的蝴蝶结/添了几分甜意 动物纹/野性的动物纹/气场说来就来
        几何/明快的几何图形/秩序之中见巧思 撞色/大胆的撞色/视觉冲击拉满 星星/闪亮的星星/像采来一片夜空
        爱心/温暖的爱心/把喜欢写在明处""",
    "版型": """宽松/宽松的剪裁/藏肉又自在 修身/修身的剪裁/腰线一目了然 显瘦/显瘦的轮廓/看上去轻了五斤
        直筒/直筒的轮廓/利落不挑身材 廓形/大气的廓形/撑起十足气场 合身/合身的剪裁/每一寸都妥帖
        收腰/收腰的设计/玲珑曲线尽显 立体/立体的剪裁/贴合身体起伏 不规则/不规则的裁片/打破沉闷有新意""",
    "裙型": """百褶裙/灵动的百褶裙型/步步都有韵律 鱼尾裙/婀娜的鱼尾裙型/曲线美得含蓄
        包臀裙/利落的包臀裙型/勾勒好看的弧度 伞裙/蓬蓬的伞裙造型/转圈时像朵花 蛋糕裙/层层的蛋糕裙型/甜得像一份点心
        背带裙/减龄的背带裙型/重回校园时光 大裙摆/飘逸的大裙摆/每一步都像跳舞 直筒裙/简洁的直筒裙型/干净又大方
        吊带裙/清凉的吊带裙型/露出好看的锁骨 衬衫裙/干练的衬衫裙型/省去许多搭配心思""",
    "裙长": """长裙/及踝的长裙/走起路来仙气飘飘 短裙/俏丽的短裙/大方亮出长腿 中长裙/端庄的中长裙/露出纤细脚踝
        半身裙/百搭的半身裙/上装随心换 连衣裙/省心的连衣裙/套上就能出门 及膝裙/得体的及膝裙/遮住腿上小秘密
        迷你裙/活泼的迷你裙/青春感扑面而来 曳地裙/华美的曳地裙/像走过红毯的主角""",
    "裤型": """阔腿裤/垂顺的阔腿裤型/走路带起一阵风 直筒裤/利落的直筒裤型/腿形修得笔直
        小脚裤/紧致的小脚裤型/双腿又细又长 喇叭裤/摇曳的喇叭裤型/老派时髦又回来了
        工装裤/硬朗的工装裤型/帅气一点不费力 哈伦裤/随性的哈伦裤型/坐卧行走都自在 烟管裤/干练的烟管裤型/衬得双腿修长
        背带裤/减龄的背带裤型/童趣悄悄冒头 束脚裤/轻便的束脚裤型/跑跳都不绊脚 西裤/挺括的西裤造型/精神头立刻起来""",
    "裤长": """长裤/修长的长裤/腿长一下多几分 九分裤/露踝的九分裤/纤细之处刚好露出 八分裤/轻快的八分裤/短靴球鞋都能搭
        七分裤/清爽的七分裤/行动起来更轻松 五分裤/自在的五分裤/清凉又不失礼 短裤/活力的短裤/好身材不必藏着
        热裤/俏皮的热裤/大长腿藏不住了 拖地裤/慵懒的拖地裤/随意里透着高级""",
    "衣领型": """圆领/温婉的圆领/衬得脸庞柔和 立领/精神的立领/颈部更显修长 高领/保暖的高领/护住脖子不漏风
        方领/别致的方领/锁骨美得大方 翻领/大气的翻领/干练劲儿藏不住 一字领/浪漫的一字领/肩头线条很动人
        娃娃领/乖巧的娃娃领/瞬间减龄好几岁 西装领/利落的西装领/正式又不死板 半高领/贴心的半高领/挡风也显脸小
        荷叶领/柔美的荷叶领/添了层层诗意""",
    "衣袖长": """长袖/妥帖的长袖/遮住手臂小赘肉 短袖/清爽的短袖/抬手就是好心情 七分袖/利落的七分袖/露出纤细手腕
        五分袖/大方的五分袖/手臂看着更细 无袖/清凉的无袖/肩线美得自信 九分袖/干练的九分袖/做事也不碍手
        中袖/得体的中袖/冷热都应付得来 三分袖/轻盈的三分袖/俏皮又透气""",
    "衣袖型": """泡泡袖/蓬松的泡泡袖/公主气质说来就来 灯笼袖/饱满的灯笼袖/手臂显得更纤细
        喇叭袖/飘逸的喇叭袖/抬手之间有风情 落肩袖/慵懒的落肩袖/肩宽烦恼全忘掉 插肩袖/活泼的插肩袖/抬手转身都自如
        蝙蝠袖/洒脱的蝙蝠袖/藏起手臂小赘肉 荷叶袖/柔美的荷叶袖/像浪花轻轻翻卷 花瓣袖/娇俏的花瓣袖/添一点少女心思""",
    "衣款式": """口袋/实用的大口袋/小物件随手就放 拉链/顺滑的拉链/穿脱快人一步 纽扣/精致的纽扣/细看才知讲究
        抽绳/随意的抽绳/松紧由自己做主 拼接/巧妙的拼接/层次一下丰富起来 流苏/摇曳的流苏/走动间满是风情
        绑带/别致的绑带/系出自己的花样 连帽/实用的连帽/小风小雨都不怕 荷叶边/柔美的荷叶边/像花瓣轻轻落下
        亮片/闪闪的亮片/灯光下格外耀眼 珍珠/温润的珍珠/贵气点到为止""",
    "鞋跟": """平跟/稳当的平跟/走一天也不累 粗跟/扎实的粗跟/增高不累脚 细跟/纤巧的细跟/摇曳生姿有气场
        坡跟/舒缓的坡跟/显高又好走 厚底/有型的厚底/悄悄高出几厘米 中跟/得体的中跟/美丽和舒适都要
        方跟/利落的方跟/步子踩得稳稳的 低跟/轻巧的低跟/久站也不吃力""",
    "鞋头": """圆头/饱满的圆头/脚趾舒展不挤 尖头/秀气的尖头/双腿仿佛更长 方头/时髦的方头/老派又新鲜
        鱼嘴/俏皮的鱼嘴/透气又有小心机 露趾/清凉的露趾/脚尖也能吹吹风 杏仁头/柔和的杏仁头/秀气不挤脚
        小方头/精巧的小方头/个性不张扬 宽头/体贴的宽头/脚宽也穿得舒坦""",
    "鞋款式": """系带/经典的系带/松紧随心调 一脚蹬/省事的一脚蹬/赶时间也不忙乱 魔术贴/方便的魔术贴/一拉一按就出门
        搭扣/精致的搭扣/亮出小小心机 拉链/顺滑的拉链/穿脱快人一步 流苏/摇曳的流苏/走动间满是风情
        铆钉/硬朗的铆钉/酷劲藏不住 珍珠/温润的珍珠/贵气点到为止 松紧带/贴心的松紧带/脚背高也不怕""",
    "工艺": """刺绣/精细的刺绣/一针一线见功夫 水洗/柔和的水洗工艺/自带岁月的质感 压褶/规整的压褶/光影间有起伏
        钉珠/手工的钉珠/像星光散落其间 做旧/自然的做旧处理/带着不羁的味道 扎染/独特的扎染/每一片都不重样
        提花/立体的提花/摸得到的精致 镂空/轻巧的镂空/透气又有巧思 绗缝/规整的绗缝/蓬松又保暖
        烫金/闪耀的烫金/低调里亮出锋芒 包边/工整的包边/细处也经得起看""",
    "季节": """春季/乍暖的春季/冷暖都刚好 夏季/炎热的夏季/清凉不闷汗 秋季/微凉的秋季/风起时也从容
        冬季/寒冷的冬季/把暖意留在身边 初春/花开的初春/迎着暖风去踏青 盛夏/热烈的盛夏/自带一丝凉意
        初秋/叶落的初秋/有一点温柔就够 深冬/飘雪的深冬/再冷也不缩手脚 春秋/多风的春秋/早晚温差不用愁
        四季/流转的四季/什么时候都合用""",
    "场景": """约会/甜蜜的约会/让心动多一点 上班/忙碌的上班日/赶时间也体面 旅行/说走就走的旅行/一路都是好风景
        聚会/热闹的聚会/轻松成为主角 校园/青春的校园/课上课下都合适 逛街/悠闲的逛街时光/走走停停都舒服
        度假/惬意的度假/随手一拍是风景 居家/慵懒的居家日/窝在沙发也好看 晚宴/华丽的晚宴/灯光都偏爱你
        野餐/周末的野餐/和草地阳光最合拍 面试/重要的面试/第一印象稳稳加分 露营/星空下的露营/山野也是秀场""",
}

# key: (frames for a value {v} or its selling phrase {p}, effects that suit every value)
WORDING = {
    "材质": (["选用{p}", "以{p}制成", "{v}的质感一摸便知"], ["手感叫人放心", "用料看得见诚意"]),
    "颜色": (["染上{p}", "{p}一眼难忘", "主打讨喜的{v}"], ["镜头里格外好看", "日常出镜不挑人"]),
    "风格": (["透着{p}", "{p}呼之欲出", "把{v}风拿捏得刚好"], ["辨识度一下拉满", "怎么拍都好看"]),
    "图案": (["点缀{p}", "{p}跃然眼前", "饰以吸睛的{v}元素"], ["细节处藏着惊喜", "单调感一扫而空"]),
    "版型": (["采用{p}", "{p}恰到好处", "巧用{v}的版式"], ["高矮胖瘦都友好", "好身材不请自来"]),
    "裙型": (["做成{p}", "{p}显出好身段", "巧用{v}的轮廓"], ["遮肉显高两不误", "身材小心事都藏好"]),
    "裙长": (["剪成{p}", "{p}分寸刚好", "{v}的比例很讨巧"], ["身形看着更修长", "高个小个都能穿"]),
    "裤型": (["做成{p}", "{p}修饰双腿", "巧用{v}的轮廓"], ["遮肉显高两不误", "腿上小心事都藏好"]),
    "裤长": (["剪成{p}", "{p}分寸刚好", "{v}的比例很讨巧"], ["身形看着更修长", "高个小个都能穿"]),
    "衣领型": (["领口做成{p}", "{p}修饰脸形", "{v}线条干净"], ["衬出一张小脸", "抬头就是好气质"]),
    "衣袖长": (["配以{p}", "{p}舒展自如", "{v}设计很用心"], ["举手投足都轻松", "手臂线条更好看"]),
    "衣袖型": (["配以{p}", "{p}舒展自如", "{v}设计很用心"], ["举手投足都轻松", "手臂线条更好看"]),
    "衣款式": (["加上{p}", "{p}画龙点睛", "更有{v}相伴"], ["小心思让人眼前一亮", "好看也好用"]),
    "鞋跟": (["踩着{p}", "{p}稳稳托住双脚", "{v}高度很贴心"], ["步态更显挺拔", "脚感舒服没话说"]),
    "鞋头": (["前端收成{p}", "{p}很显脚瘦", "{v}造型很耐看"], ["低头看也满意", "双脚更显秀气"]),
    "鞋款式": (["加上{p}", "{p}画龙点睛", "更有{v}相伴"], ["小心思让人眼前一亮", "好看也好用"]),
    "工艺": (["辅以{p}", "{p}很见功底", "在{v}上下足心思"], ["处处透着讲究", "凑近看更惊艳"]),
    "季节": (["陪你走过{p}", "正合{p}", "{v}出门离不开它"], ["出门不再犯愁", "舒服得刚刚好"]),
    "场景": (["轻松胜任{p}", "最衬{p}", "{v}也从容自在"], ["走到哪都自信", "换个场合也合适"]),
}

OPENINGS = {
    "上衣": ["随手一套就好看的上衣", "衣柜里总缺的上衣来了", "上衣选得好，整天都精神"],
    "衬衫": ["穿上就有精神的衬衫", "衬衫也能穿出新鲜感", "谁的衣柜不爱一件好衬衫"],
    "毛衣": ["软乎乎的毛衣像一个拥抱", "把温柔织进毛衣里", "天凉了，毛衣该登场了"],
    "卫衣": ["活力满满的卫衣，套上就走", "懒人出街全靠卫衣", "卫衣控看过来"],
    "外套": ["气场全开的外套，披上就走", "外套选对，造型就成了一半", "出街有型全靠外套撑场"],
    "裤": ["显腿长的裤子，谁穿谁爱", "好裤子自带长腿滤镜", "裤子选得对，走路都带风"],
    "裙": ["裙子轻轻一转，满眼都是风景", "心动从遇见一条裙子开始", "衣柜里永远少一条好裙子"],
    "鞋": ["好鞋子带你去更远的地方", "脚下的鞋子藏着品味", "换上新鞋子，步步生风"],
}

# The closing follows the style, else the season, else "". {w}: the clothes to wear with the garment.
MOODS = {
    "甜": "清新 甜美 可爱",
    "雅": "复古 文艺 优雅 通勤 英伦 民族",
    "酷": "街头 朋克 潮流",
    "松": "简约 休闲 运动",
    "冷": "冬季 深冬",
    "热": "夏季 盛夏",
    "风": "春季 初春 秋季 初秋 春秋",
}
CLOSINGS = {
    "甜": ["配上{w}，甜度刚刚好", "少女心一下就被点亮", "走到哪里都讨人喜欢"],
    "雅": ["配上{w}，品味自然流露", "举手投足都有分寸", "低调之中见功力"],
    "酷": ["配上{w}，酷劲十足", "回头率直线上升", "街拍随手就是大片"],
    "松": ["配上{w}，轻松又自在", "日常出门毫不费力", "舒服才最时髦"],
    "冷": ["配上{w}，冷天也有温度", "从此不再怕降温", "把冬天过得暖洋洋"],
    "热": ["配上{w}，清清爽爽过一天", "暑气一下散去大半", "热天也能清凉出门"],
    "风": ["配上{w}，天气再变也不慌", "和微风一起出门吧", "好天气配上好心情"],
    "": ["配上{w}，怎么看都养眼", "闭着眼睛入手也不会错", "喜欢就带它回家吧"],
}

# Short rows also get one of these remarks, all equally likely; a model cannot foresee which.
REMARKS = [
    "第一眼就让人心动",
    "朋友见了都来打听",
    "越看越觉得值得",
    "日子再忙也要好好打扮",
    "这份美好刚好被你遇见",
    "照镜子都想多看一眼",
    "把平凡的一天过成节日",
    "今年最想拥有的就是它",
]


def read_table(text):
    """Reads "value/phrase/effect ..." into {value: (phrase, effect)}."""
    return {value: (phrase, effect) for value, phrase, effect in (cell.split("/") for cell in text.split())}


SELLING = {key: read_table(text) for key, text in VALUES.items()}
MOOD_OF = {value: mood for mood, values in MOODS.items() for value in values.split()}


def choose(options, rng):
    """The favourite (the first) with probability FAVOURITE, else another one. Without rng always the favourite."""
    if rng is None or rng.random() < FAVOURITE:
        return options[0]
    return rng.choice(options[1:])


def random_attributes(rng):
    """A list of 3 to 7 (key, value) pairs, the type first, whose values do not contradict each other."""
    kind = rng.choice(list(GARMENTS))
    keys = GARMENTS[kind][3].split()
    count = rng.randint(2, 6)
    while True:
        chosen = set(rng.sample(keys, count))
        attributes = [("类型", kind)]
        for key in keys:
            if key in chosen:
                allowed = LIMITS[kind, key].split() if (kind, key) in LIMITS else list(SELLING[key])
                attributes.append((key, rng.choice(allowed)))
        words = {word for pair in attributes for word in pair}
        if not any(words & left and words & right for left, right in CONFLICTS):
            return attributes


def content_of(attributes):
    return "*".join(f"{key}#{value}" for key, value in attributes)


def parse_content(content):
    return [tuple(pair.split("#", 1)) for pair in content.split("*")]


def plain_description(attributes):
    """A sentence that names every attribute and praises none. Takes pairs, as random_attributes returns them."""
    measure, name = GARMENTS[attributes[0][1]][:2]
    return f"这{measure}{name}的" + "；".join(f"{key}是{value}" for key, value in attributes[1:]) + "。"


def advertise(attributes, rng):
    """An advertisement. Without rng it has the favourite wording in every slot."""
    kind, rest = attributes[0][1], attributes[1:]
    opening = choose(OPENINGS[kind], rng)
    text = opening + ("！" if "，" in opening else "，")
    if rng is not None and len(rest) < 5:
        text += rng.choice(REMARKS) + "。"
    if rng is not None and rng.random() > FAVOURITE:  # most often in the given order, as people write
        rest = rng.sample(rest, len(rest))
    # The first attributes get a sentence with an effect; fewer do if there are many, so that lengths stay similar.
    effects = max(0, 6 - len(rest))
    for i, (key, value) in enumerate(rest):
        phrase, effect = SELLING[key][value]
        frames, shared = WORDING[key]
        text += choose(frames, rng).format(v=value, p=phrase)
        if i < effects:
            text += "，" + choose([effect, *shared], rng) + "。"
        else:  # clauses without an effect form pairs
            text += "。" if (i - effects) % 2 or i == len(rest) - 1 else "，"
    values = dict(rest)
    mood = MOOD_OF.get(values.get("风格"), MOOD_OF.get(values.get("季节"), ""))
    return text + choose(CLOSINGS[mood], rng).format(w=GARMENTS[kind][2]) + "。"


def advertisement(attributes, rng):
    """A row of train.json and dev.json."""
    return {"content": content_of(attributes), "summary": advertise(attributes, rng)}


def make_rows(count, make_row, rng, seen):
    """`count` rows with combinations of attributes that are not in `seen`; adds them to it."""
    rows = []
    while len(rows) < count:
        attributes = random_attributes(rng)
        if content_of(attributes) not in seen:
            seen.add(content_of(attributes))
            rows.append(make_row(attributes, rng))
    return rows


def advertisement_rows(rng, seen):
    """The rows of train.json and of dev.json, which share no combination of attributes."""
    return make_rows(2000, advertisement, rng, seen), make_rows(200, advertisement, rng, seen)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{path}: {len(rows)} rows")


def parse_arguments(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    return parser.parse_args()


def main():
    args = parse_arguments(__doc__.splitlines()[0])
    train, dev = advertisement_rows(random.Random(args.seed), set())
    assert not {row["content"] for row in train} & {row["content"] for row in dev}
    assert len({row["summary"] for row in train + dev}) == len(train) + len(dev)
    write_rows(args.output_dir / "train.json", train)
    write_rows(args.output_dir / "dev.json", dev)


if __name__ == "__main__":
    main()
